"""What the operators of a decoding step mean, in terms of reference.py."""

import torch
from torch import Tensor

from internvl_engine import reference

SQUARES = 16  # channels that share a sum of squares


def sums_of_squares(x: Tensor) -> Tensor:
    """Of every 16 channels, for RMSNorm: (..., C) to (..., ceil(C / 16)), float32 or wider."""
    squares = torch.nn.functional.pad(reference.widen(x).square(), (0, -x.shape[-1] % SQUARES))
    return squares.unflatten(-1, (-1, SQUARES)).sum(-1)


def norm_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, norm_weight: Tensor | None,
    squares: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    """`linear` of the RMSNorm of x; of x itself where norm_weight (C,) is None.

    squares: (..., P), which add up to each row's sum of x * x, or None: they are computed.
    """
    if norm_weight is not None:
        squares = sums_of_squares(x) if squares is None else squares
        mean = squares.sum(-1, keepdim=True) / x.shape[-1]
        x = norm_weight * (reference.widen(x) * torch.rsqrt(mean + eps)).to(x.dtype)
    return reference.linear(x, weight, bias, epilogue)


def linear_squares(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y = residual + x @ weight.T + bias, and its sums of squares, for the norm that comes next."""
    y = reference.linear(x, weight, bias, "none", residual)
    return y, sums_of_squares(y)
