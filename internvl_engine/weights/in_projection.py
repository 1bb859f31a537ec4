"""The weights of q, k and v that an nn.MultiheadAttention holds itself, in one parameter."""

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class InProjection:
    """in_proj_weight (3 C, C) and in_proj_bias (3 C,) or None, as a Linear has its own."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        self.attention = attention

    @staticmethod
    def of(module: Any) -> "InProjection | None":
        """That of a module; None where there is none, or q, k and v have weights apart."""
        packed = isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None
        return InProjection(module) if packed else None

    @property
    def weight(self) -> Tensor:
        return self.attention.in_proj_weight

    @property
    def bias(self) -> Tensor | None:
        return self.attention.in_proj_bias

    def modules(self) -> Iterator[nn.Module]:
        """The one module whose parameters these are."""
        yield self.attention

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)
