"""What both engines do with the weights of their models: fuse them, and hand them to processes."""

import io
import warnings
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from ..memory import memory

KEPT = 0.8  # of the memory that is available, for layers that stay in it


def accelerated(model: Any, parts: str, name: str) -> Any:
    """Swaps in the fused modules and returns the report.

    Mapped weights that the memory has no room for stay in their files, as they lie there: the
    layers that do not fit are read at every use. A warning says so, and what to load instead.

    Args:
        model: in eval mode.
        parts: which of it are there.
        name: of the engine, for the warning.
    """
    from ..acceleration import accelerate
    from ..checkpoint.streaming import Stream, are_mapped

    held = {n: p for n, p in model.named_parameters() if p.device.type == "cpu"}
    weights = sum(parameter.nbytes for parameter in held.values())
    available = memory()["available"]
    if weights <= available or not are_mapped(held.values()):
        return accelerate(model)
    # Packing would copy the weights. Forms of fewer bits are multiplied with as they lie.
    stream = Stream(model, int(available * KEPT))
    report = accelerate(model, mode="training")
    less = _what_fits(held, parts, available) if name == "InternVL" else None
    less = less or "quantize='int8' takes a quarter of float32's and half of bfloat16's"
    warnings.warn(
        f"{name}: {weights / 1e9:.1f} GB of weights stay mapped from their files, and "
        f"{stream.nbytes / 1e9:.1f} GB of them are read there at every use, because only "
        f"{available / 1e9:.1f} GB of memory are available; {less}",
        stacklevel=4,
    )
    return report


def _what_fits(held: dict[str, Any], parts: str, available: int) -> str | None:
    from ..checkpoint.fitting import BYTES, advice, parameters_by_parts, quantized_by_parts

    dtype = str(next(iter(held.values())).dtype).removeprefix("torch.")
    if dtype not in BYTES:
        return None
    sizes = parameters_by_parts({name: p.numel() for name, p in held.items()}, parts)
    shapes = {name: tuple(p.shape) for name, p in held.items()}
    return advice(available, parts, dtype, sizes, quantized_by_parts(shapes, parts))


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
