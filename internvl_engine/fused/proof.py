"""Whether a fused module computes what an eager one does, which names and shapes cannot tell.

A module with the parameters of a known one may scale, clamp, mask or turn in between. So one of its
kind is tried: a stand-in of the same classes and settings, with random float32 weights on the CPU,
computes both ways. The module itself is not called, trained, moved or written.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .base import FusedModule, same_arguments

# Float32 rounds sums of up to 16,384 products to within 1e-5 of their norm, and another order of
# three layers of them stays below this; a limit, a scale or an epsilon of its own shows as 1e-3.
TOLERANCE = 1e-4
# The tokens of an image: 4 x 4 patches and one more. The first is small enough for every epsilon
# to show, the last large enough for every limit to.
SCALES = torch.logspace(-2, 3, 17)[:, None]
# Of these the tests of every fused module are the proof.
PROVED = ("internvl_engine.", "torch.nn.modules.", "transformers.activations")

Draw = Callable[..., Tensor]


class Proofs:
    """Tries one module of every kind, and remembers what came of it."""

    def __init__(self) -> None:
        self._objections: dict[tuple, str | None] = {}

    def objection(self, kind: type[FusedModule], module: nn.Module) -> str | None:
        """Why a module that a fused class claims must stay eager, or None. Never raises."""
        try:
            objection = kind.objection(module)
            if objection is not None or _is_proved(module):
                return objection
            key = (kind, _settings(module))
            if key not in self._objections:
                self._objections[key] = _try(kind, module)
            return self._objections[key]
        except Exception as error:  # noqa: BLE001  somebody's code, which may do anything
            return f"it could not be tried: {type(error).__name__}: {error}"


def _is_proved(module: nn.Module) -> bool:
    return all(type(m).__module__.startswith(PROVED) for m in module.modules())


def _settings(module: nn.Module) -> tuple:
    """All of a module that decides what it computes, but its weights."""
    plain = (bool, int, float, str)
    return tuple(
        (
            name,
            type(m),
            tuple(sorted((k, v) for k, v in vars(m).items() if isinstance(v, plain))),
            tuple((k, None if p is None else p.shape) for k, p in m._parameters.items()),
        )
        for name, m in module.named_modules()
    )


def _try(kind: type[FusedModule], module: nn.Module) -> str | None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    def uniform(low: float, high: float, shape: torch.Size) -> Tensor:
        empty = torch.empty(shape, dtype=torch.float32, device="cpu")
        return empty.uniform_(low, high, generator=generator)

    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        arguments = kind.trial(module, lambda *shape: draw(*shape) * SCALES)
        if arguments is None:
            return None
        if not same_arguments(kind, type(module)):
            return f"its forward takes other arguments than that of {kind.__name__}"
        stand_in = _stand_in(module, uniform)
        fused = kind(stand_in, True)
        for projection in fused.projections():  # a stand-in is not worth packing
            projection.inference = False
        for training in (False, True):  # what drops shows in training only
            outputs = []
            for one in (fused, stand_in):
                nn.Module.train(one, training)
                with torch.random.fork_rng(devices=()):
                    torch.manual_seed(0)
                    outputs.append(one.forward(*arguments))
            if not _same(*outputs):
                return f"{type(module).__name__} computes something else than {kind.__name__}"
    return None


def _stand_in(module: Any, uniform: Draw) -> Any:
    """A module of the same classes and settings, in evaluation, with nobody's hooks."""
    if isinstance(getattr(module, "in_features", None), int):  # also quantized, or with LoRA:
        width, bias = module.in_features, getattr(module, "bias", None) is not None
        linear = nn.Linear(width, module.out_features, bias, device="meta")
        spread = (3 / width) ** 0.5  # outputs as large as inputs
        for name, parameter in linear.named_parameters():
            linear._parameters[name] = nn.Parameter(uniform(-spread, spread, parameter.shape))
        return linear
    copied = object.__new__(type(module))
    copied.__dict__.update(module.__dict__, training=False)
    copied.__dict__.pop("forward", None)
    for name in [name for name in vars(copied) if "_hooks" in name]:
        copied.__dict__[name] = OrderedDict()
    copied._parameters = {
        name: None if p is None else nn.Parameter(uniform(0.5, 1.5, p.shape))
        for name, p in module._parameters.items()
    }
    copied._buffers = {name: _plain(buffer) for name, buffer in module._buffers.items()}
    copied._modules = {
        name: None if child is None else _stand_in(child, uniform)
        for name, child in module._modules.items()
    }
    return copied


def _plain(buffer: Tensor | None) -> Tensor | None:
    if buffer is None or not buffer.is_floating_point():
        return None if buffer is None else buffer.to("cpu", copy=True)
    return buffer.to("cpu", torch.float32, copy=True)


def _same(ours: Any, theirs: Any) -> bool:
    """Whether every token of every output is the same within rounding."""
    if not isinstance(theirs, Tensor):
        return ours is theirs or (
            isinstance(ours, tuple)
            and isinstance(theirs, tuple)
            and len(ours) == len(theirs)
            and all(map(_same, ours, theirs))
        )
    error = (ours - theirs).norm(dim=-1)
    same = ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return same and bool((error <= TOLERANCE * theirs.norm(dim=-1)).all())
