"""Whether a module computes what a fused class does, found out on random weights.

A stand-in of the same classes and settings, with random float32 weights on the CPU, computes both
ways.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..fused import FusedModule

# Float32 rounds sums of up to 16,384 products to within 1e-5 of their norm, and another order of
# three layers of them stays below this; a limit, a scale or an epsilon of its own shows as 1e-3.
TOLERANCE = 1e-4
# The tokens of an image: 4 x 4 patches and one more. The first is small enough for every epsilon
# to show, the last large enough for every limit to.
SCALES = torch.logspace(-2, 3, 17, dtype=torch.float32, device="cpu")[:, None]


_OF_EVERY_MODULE = vars(nn.Module()).keys()
_PLAIN = (bool, int, float, str, type(None), tuple, list, dict, torch.dtype)  # by what they say


def compare(kind: type[FusedModule], module: nn.Module) -> str | None:
    """What is different about a module, or None."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    def uniform(low: float, high: float, shape: torch.Size) -> Tensor:
        empty = torch.empty(shape, dtype=torch.float32, device="cpu")
        return empty.uniform_(low, high, generator=generator)

    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        arguments = kind.example_inputs(module, lambda *shape: draw(*shape) * SCALES)
        stand_in = _stand_in(module, uniform)
        outputs = [_in_both_modes(stand_in, arguments)]
        kind.fuse(stand_in, inference=False)
        outputs.append(_in_both_modes(stand_in, arguments))
    if not _same(outputs[1], outputs[0]):
        return f"{type(module).__name__} computes something else than {kind.__name__}"
    return None


def _in_both_modes(module: nn.Module, arguments: tuple) -> tuple:
    """What it computes in evaluation and, where dropout shows, in training."""
    outputs = []
    for training in (False, True):
        module.train(training)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            outputs.append(module.forward(*arguments))
    return tuple(outputs)


def _stand_in(module: Any, uniform: Callable[..., Tensor]) -> Any:
    """A module of the same classes and settings with nobody's hooks."""
    if isinstance(getattr(module, "in_features", None), int):  # also quantized, or with LoRA:
        width, bias = module.in_features, getattr(module, "bias", None) is not None
        linear = nn.Linear(width, module.out_features, bias, device="meta")
        spread = (3 / width) ** 0.5  # outputs as large as inputs
        for name, parameter in linear.named_parameters():
            linear._parameters[name] = nn.Parameter(uniform(-spread, spread, parameter.shape))
        return linear
    copied = object.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    copied.__dict__.pop("forward", None)
    for name in [name for name in vars(copied) if "_hooks" in name]:
        copied.__dict__[name] = OrderedDict()
    copied._parameters = {
        name: None if p is None else nn.Parameter(_values_like(p, uniform))
        for name, p in module._parameters.items()
    }
    copied._buffers = {name: _plain(buffer) for name, buffer in module._buffers.items()}
    copied._modules = {
        name: None if child is None else _stand_in(child, uniform)
        for name, child in module._modules.items()
    }
    return copied


def _values_like(parameter: Tensor, uniform: Callable[..., Tensor]) -> Tensor:
    if parameter.dim() < 2:
        return uniform(0.5, 1.5, parameter.shape)
    spread = (3 / parameter.shape[-1]) ** 0.5  # as a Linear's, see _stand_in
    return uniform(-spread, spread, parameter.shape)


def _plain(buffer: Tensor | None) -> Tensor | None:
    if buffer is None or not buffer.is_floating_point():
        return None if buffer is None else buffer.to("cpu", copy=True)
    return buffer.to("cpu", torch.float32, copy=True)


def _same(ours: Any, theirs: Any) -> bool:
    """Whether every token of every output is the same within rounding."""
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
        return ours is theirs
    error = (ours - theirs).norm(dim=-1)
    same = ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return same and bool((error <= TOLERANCE * theirs.norm(dim=-1)).all())


def settings_of(module: nn.Module) -> tuple:
    """All of a module that decides what it computes, but its weights; objects by their identity."""
    return tuple(
        (
            name,
            type(m),
            tuple(
                (key, repr(value) if isinstance(value, _PLAIN) else id(value))
                for key, value in vars(m).items()
                if key not in _OF_EVERY_MODULE
            ),
            tuple((k, None if p is None else p.shape) for k, p in m._parameters.items()),
            tuple((k, None if b is None else id(b)) for k, b in m._buffers.items()),
        )
        for name, m in module.named_modules()
    )
