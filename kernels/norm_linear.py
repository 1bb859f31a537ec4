"""A linear layer that normalises what it reads: RMSNorm and product in one kernel.

    y = epilogue(n @ weight.T + bias)      n = norm_weight * round(x / sqrt(mean(x**2) + eps))

For decoding, where a norm by itself is a launch and a trip through memory. The mean comes from the
sums of squares that the kernel before stored (linear_squares.py); n is rounded where rms_norm
rounds it. The weight has any form: wide, int8 or int4.

x is (M, C), weight (F, C), C = 4096, F = 22016 with SwiGLU, or the vocabulary behind the last norm.
Bound by reading the weight: F * C * bytes / bandwidth for 1 to 8 rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _decoding
from ._epilogue import output_shape
from ._gemv import Norm, check_form, check_norm, linear_cuda, weight_of
from ._library import define
from .linear import check_operands


def norm_linear_composed(
    x: Tensor, weight: Tensor, scales: Tensor | None, sums: Tensor | None, features: int,
    bias: Tensor | None, epilogue: str, norm_weight: Tensor | None, squares: Tensor | None,
    eps: float,
) -> Tensor:  # fmt: skip
    """The operators of the norm and of the weight's form, one after the other."""
    if norm_weight is not None:
        x = torch.ops.internvl.rms_norm.default(x, norm_weight, eps)
    held = weight_of((weight, scales, sums), features, x.shape[-1])
    return held.product(x, bias, epilogue)


def norm_linear_cuda(
    x: Tensor, weight: Tensor, scales: Tensor | None, sums: Tensor | None, features: int,
    bias: Tensor | None, epilogue: str, norm_weight: Tensor | None, squares: Tensor | None,
    eps: float,
) -> Tensor:  # fmt: skip
    """Calls csrc/cuda/linear.cu."""
    held = weight_of((weight, scales, sums), features, x.shape[-1])
    norm = None if norm_weight is None else Norm(norm_weight, squares, eps)
    return linear_cuda(x, held, bias, epilogue, None, norm)


def _reference(
    x: Tensor, weight: Tensor, scales: Tensor | None, sums: Tensor | None, features: int,
    bias: Tensor | None, epilogue: str, norm_weight: Tensor | None, squares: Tensor | None,
    eps: float,
) -> Tensor:  # fmt: skip
    dense = weight_of((weight, scales, sums), features, x.shape[-1]).dense(x.dtype)
    return _decoding.norm_linear(x, dense, bias, epilogue, norm_weight, squares, eps)


_norm_linear = define(
    "norm_linear(Tensor x, Tensor weight, Tensor? scales, Tensor? sums, int features, Tensor? bias,"
    " str epilogue, Tensor? norm_weight, Tensor? squares, float eps) -> Tensor",
    reference=_reference,
    fake=lambda x, weight, scales, sums, features, bias, epilogue, *_: x.new_empty(
        output_shape(x, features, epilogue)
    ),
    cpu={"composed": norm_linear_composed},
    # The operators by themselves until a measurement on a GPU says otherwise.
    cuda={"composed": norm_linear_composed, "cuda": norm_linear_cuda},
)


def norm_linear(
    x: Tensor, weight: Sequence[Tensor], features: int, bias: Tensor | None = None,
    epilogue: str = "none", norm_weight: Tensor | None = None, squares: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """epilogue(rms_norm(x, norm_weight, eps) @ weight.T + bias).

    Args:
        x: (..., C), any strides.
        weight: what its form consists of: (weight,), (F, C) of the dtype of x; (packed, scales,
            sums) of `quantize_int8`; (packed, scales) of `quantize_int4`.
        features: F.
        bias: (F,), the dtype of x, or None.
        epilogue: as in `linear`.
        norm_weight: (C,), the dtype of x; None: x is not normalised.
        squares: (..., P) of float32, which add up to the sum of x * x of every row, as
            `linear_squares` returns them; None where nobody has them.
        eps: added to the mean square.

    Returns:
        (..., F), or (..., F / 2) with "swiglu", contiguous, the dtype of x.

    Raises:
        ValueError: shapes or dtypes that do not go together, or an unknown epilogue.
    """
    held = weight_of(weight, features, x.shape[-1])
    check_form("norm_linear", x, held)
    check_norm("norm_linear", x, norm_weight, squares)
    shape = torch.Size((features, x.shape[-1]))
    check_operands("norm_linear", x, shape, x.dtype, bias, epilogue, None)
    parts = (*held.parts, None, None)[:3]
    return _norm_linear(x, *parts, features, bias, epilogue, norm_weight, squares, eps)
