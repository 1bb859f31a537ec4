"""What both engines do with the weights of their models: fuse them, and hand them to processes."""

import io
import warnings
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from ..memory import memory


def accelerated(model: Any, parts: str, name: str) -> Any:
    """Swaps in the fused modules and returns the report; None where memory does not suffice.

    Args:
        model: in eval mode.
        parts: which of it are there.
        name: of the engine, for the warning.
    """
    from ..acceleration import accelerate

    held = {n: p for n, p in model.named_parameters() if p.device.type == "cpu"}
    weights = sum(parameter.numel() * parameter.element_size() for parameter in held.values())
    available = memory()["available"]
    if weights <= available:
        return accelerate(model)
    # On the CPU fused weights are packed, which takes memory; mapped ones stay in their file.
    less = _what_fits(held, parts, available) if name == "InternVL" else None
    warnings.warn(
        f"{name}: {weights / 1e9:.1f} GB of weights stay mapped and eager, because only "
        f"{available / 1e9:.1f} GB of memory are available; {less or 'parts= loads less'}",
        stacklevel=4,
    )
    return None


def _what_fits(held: dict[str, Any], parts: str, available: int) -> str | None:
    from ..checkpoint.fitting import BYTES, advice, parameters_by_parts

    dtype = str(next(iter(held.values())).dtype).removeprefix("torch.")
    sizes = parameters_by_parts({name: p.numel() for name, p in held.items()}, parts)
    return advice(available, parts, dtype, sizes) if dtype in BYTES else None


def passed_as_bytes(engine_class: type) -> None:
    """Lets engines of a class go to other processes as bytes.

    PyTorch's own way, a file descriptor for every tensor, fails where two weights lie in one
    storage, as merged ones do.
    """
    ForkingPickler.register(engine_class, _reduced)


def _restored(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=False)


def _reduced(engine: Any) -> tuple[Any, ...]:
    buffer = io.BytesIO()
    torch.save(engine, buffer)
    return _restored, (buffer.getvalue(),)
