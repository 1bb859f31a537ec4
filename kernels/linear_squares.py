"""A linear layer with the residual add, and the statistic of the norm that comes next.

    y = residual + x @ weight.T + bias      squares[i] = sum of y[16 i : 16 i + 16]**2

RMSNorm divides by sqrt(mean(y**2)), so the sums of squares are all that norm_linear.py and
decode_qkv.py need to apply the norm while they read y. They are of y as it is stored, rounded. The
weight has any form: wide, int8 or int4.

x is (M, C), weight (F, C), (C, F) = (4096, 4096) behind the attention and (11008, 4096) behind the
MLP. Bound by reading the weight: F * C * bytes / bandwidth for 1 to 8 rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _decoding
from ._decoding import SQUARES
from ._gemv import check_form, linear_cuda, weight_of
from ._library import contiguous, define
from .linear import check_operands


@contiguous
def linear_squares_composed(
    x: Tensor, weight: Tensor, scales: Tensor | None, sums: Tensor | None, features: int,
    bias: Tensor | None, residual: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator of the weight's form, and then the squares."""
    held = weight_of((weight, scales, sums), features, x.shape[-1])
    y = held.product(x, bias, "none", residual)
    return y, _decoding.sums_of_squares(y)


def linear_squares_cuda(
    x: Tensor, weight: Tensor, scales: Tensor | None, sums: Tensor | None, features: int,
    bias: Tensor | None, residual: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Calls csrc/cuda/linear.cu."""
    held = weight_of((weight, scales, sums), features, x.shape[-1])
    squares = x.new_empty((*x.shape[:-1], -(-features // SQUARES)), dtype=torch.float32)
    y = linear_cuda(x, held, bias, "none", residual, squares=squares)
    return y if y is NotImplemented else (y, squares)


@contiguous
def _reference(
    x: Tensor, weight: Tensor, scales: Tensor | None, sums: Tensor | None, features: int,
    bias: Tensor | None, residual: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dense = weight_of((weight, scales, sums), features, x.shape[-1]).dense(x.dtype)
    return _decoding.linear_squares(x, dense, bias, residual)


def _fake(
    x: Tensor, weight: Tensor, scales: Tensor | None, sums: Tensor | None, features: int,
    bias: Tensor | None, residual: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = torch.promote_types(x.dtype, torch.float32)
    squares = x.new_empty((*x.shape[:-1], -(-features // SQUARES)), dtype=dtype)
    return x.new_empty((*x.shape[:-1], features)), squares


_linear_squares = define(
    "linear_squares(Tensor x, Tensor weight, Tensor? scales, Tensor? sums, int features,"
    " Tensor? bias, Tensor? residual) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    cpu={"composed": linear_squares_composed},
    # The operators by themselves until a measurement on a GPU says otherwise.
    cuda={"composed": linear_squares_composed, "cuda": linear_squares_cuda},
)


def linear_squares(
    x: Tensor, weight: Sequence[Tensor], features: int, bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """residual + x @ weight.T + bias, and its sums of squares.

    Args:
        x: (..., C), any strides.
        weight: what its form consists of, as in `norm_linear`.
        features: F.
        bias: (F,), the dtype of x, or None.
        residual: (..., F), the dtype of x, or None.

    Returns:
        y (..., F), the dtype of x, and squares (..., ceil(F / 16)), float32; both contiguous.

    Raises:
        ValueError: shapes or dtypes that do not go together.
    """
    held = weight_of(weight, features, x.shape[-1])
    check_form("linear_squares", x, held)
    shape = torch.Size((features, x.shape[-1]))
    check_operands("linear_squares", x, shape, x.dtype, bias, "none", residual)
    if residual is not None and residual.dtype != x.dtype:
        raise ValueError(f"linear_squares: residual must be {x.dtype}, got {residual.dtype}")
    parts = (*held.parts, None, None)[:3]
    return _linear_squares(x, *parts, features, bias, residual)
