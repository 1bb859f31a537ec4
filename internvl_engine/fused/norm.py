"""RMSNorm and LayerNorm on the fused operators, alone and with the residual add before them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from .base import FusedModule, holds


def is_rms_norm(module: Any) -> bool:
    """Whether a module is one of the RMSNorms: a weight, an epsilon and nothing else.

    The published classes name it `variance_epsilon`, apex's FusedRMSNorm, which replaces them where
    apex is installed, `eps`.
    """
    return (
        type(module).__name__.endswith("RMSNorm")
        and holds(module, "weight")
        and epsilon(module) is not None
        and [name for name, _ in module.named_parameters()] == ["weight"]
    )


def is_norm(module: Any) -> bool:
    """Whether a module is an RMSNorm, or a LayerNorm over the last dimension."""
    if isinstance(module, nn.LayerNorm):
        return len(module.normalized_shape) == 1
    return is_rms_norm(module)


def epsilon(norm: Any) -> float | None:
    """What a norm adds to the mean square; None where it has no such number."""
    for name in ("variance_epsilon", "eps"):
        value = vars(norm).get(name)
        if isinstance(value, float | int):
            return float(value)
    return None


def normalize(norm: Any, x: Tensor) -> Tensor:
    """norm(x), by the fused operator where the norm and x share a dtype.

    Where they do not, norms round differently from each other: each keeps its own.
    """
    eps = epsilon(norm)
    if eps is None or not _has_dtype(norm, x.dtype):
        return norm(x)
    if isinstance(norm, nn.LayerNorm):
        return kernels.layer_norm(x, norm.weight, norm.bias, eps)
    return kernels.rms_norm(x, norm.weight, eps)


def add_normalize(
    x: Tensor, hidden: Tensor, scale: Tensor | None, norm: Any
) -> tuple[Tensor, Tensor]:
    """(norm(h), h) of h = hidden + x * scale, in one pass where all share a dtype."""
    eps = epsilon(norm)
    one_dtype = x.dtype == hidden.dtype and (scale is None or scale.dtype == x.dtype)
    if eps is None or not one_dtype or not _has_dtype(norm, x.dtype):
        hidden = add_scaled(x, hidden, scale)
        return normalize(norm, hidden), hidden
    if isinstance(norm, nn.LayerNorm):
        return kernels.add_layer_norm(x, hidden, scale, norm.weight, norm.bias, eps)
    return kernels.add_rms_norm(x, hidden, scale, norm.weight, eps)


def _has_dtype(norm: Any, dtype: torch.dtype) -> bool:
    return all(p is None or p.dtype == dtype for p in norm._parameters.values())


def add_scaled(x: Tensor, hidden: Tensor, scale: Tensor | None) -> Tensor:
    """hidden + x * scale in one pass."""
    if scale is None:
        return hidden + x
    if x.dtype == hidden.dtype == scale.dtype:
        return torch.addcmul(hidden, x, scale)
    return hidden + x * scale


class FusedRMSNorm(FusedModule):
    """RMSNorm of a token, of any model: (..., C) to (..., C)."""

    @classmethod
    def matches(cls, module: Any) -> bool:
        return is_rms_norm(module)

    @classmethod
    def example_inputs(cls, module: Any, draw: Callable[..., Tensor]) -> tuple:
        return (draw(2, 17, module.weight.shape[-1]),)

    def compute(self, hidden_states: Tensor) -> Tensor:
        eps = epsilon(self)
        if self.weight.dtype != hidden_states.dtype or eps is None:
            return NotImplemented
        return kernels.rms_norm(hidden_states, self.weight, eps)
