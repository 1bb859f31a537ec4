"""A fused RMSNorm in place of an eager one that stands by itself."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from .base import FusedModule, holds
from .sharing import Handoff


def is_rms_norm(module: Any) -> bool:
    """Whether a module is one of the RMSNorms: a weight, an epsilon and nothing else."""
    return (
        holds(module, "weight", "variance_epsilon")
        and "RMSNorm" in type(module).__name__
        and [name for name, _ in module.named_parameters()] == ["weight"]
    )


def normalize(norm: Any, x: Tensor) -> Tensor:
    """norm(x), by the fused operator where weight and x share a dtype.

    Where they do not, the published norms round differently from each other: each keeps its own.
    """
    if norm.weight.dtype != x.dtype:
        return norm(x)
    return kernels.rms_norm(x, norm.weight, norm.variance_epsilon)


class FusedRMSNorm(FusedModule):
    """RMSNorm of a token; QLLaMA's last norm also takes what the last layer computed for it."""

    handoff: Handoff | None = None

    @classmethod
    def claims(cls, module: Any) -> bool:
        return is_rms_norm(module)

    @classmethod
    def trial(cls, module: Any, draw: Callable[..., Tensor]) -> tuple:
        return (draw(2, 17, module.weight.shape[-1]),)

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed = None if self.handoff is None else self.handoff.take(hidden_states)
        if normed is not None:
            return normed
        if self.weight.dtype != hidden_states.dtype:
            return self.eager.forward(hidden_states)
        return kernels.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def add_normalize(
    x: Tensor, hidden: Tensor, scale: Tensor | None, norm: Any
) -> tuple[Tensor, Tensor]:
    """(norm(h), h) of h = hidden + x * scale, in one pass where all share a dtype."""
    scaled = scale is None or scale.dtype == x.dtype
    if scaled and x.dtype == hidden.dtype == norm.weight.dtype:
        return kernels.add_rms_norm(x, hidden, scale, norm.weight, norm.variance_epsilon)
    hidden = hidden + (x if scale is None else x * scale)
    return normalize(norm, hidden), hidden


def add_scaled(x: Tensor, hidden: Tensor, scale: Tensor | None) -> Tensor:
    """hidden + x * scale in one pass."""
    if scale is None:
        return hidden + x
    if x.dtype == hidden.dtype == scale.dtype:
        return torch.addcmul(hidden, x, scale)
    return hidden + x * scale
