"""The linear layer with a weight in eight-bit floating point, one scale a row.

    y = residual + epilogue(x @ (packed * scales).T + bias)      epilogue: one of _epilogue.py

packed is (F, C) float8_e4m3fn, row-major: three bits of mantissa, at most 448. scales is (F,)
float32. The reference widens the weight and leaves x as it is: right everywhere and fast nowhere.
Products accumulate in fp32 and are rounded once, after the residual add.

x is (M, C); (C, F) as in linear.py. A quarter of the bytes of fp32, half of those of bf16.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from internvl_engine import reference

from ._epilogue import output_shape
from ._library import contiguous, define
from .linear import check_operands, inputs_needing_gradient, linear_backward_blas

FP8 = torch.float8_e4m3fn


def linear_fp8_backward_reference(
    grad: Tensor, x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, epilogue: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of x and bias, with the weight widened for the time of the call."""
    weight = dequantize_fp8(packed, scales, x.dtype)
    wanted = (wanted[0], False, wanted[1])
    dx, _, dbias = linear_backward_blas(grad, x, weight, bias, epilogue, wanted)
    return dx, dbias


def _linear_fp8_fake(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None = None, epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(output_shape(x, packed.shape[0], epilogue), dtype=dtype)


def _linear_fp8_backward_fake(
    grad: Tensor, x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, epilogue: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dbias = packed.shape[:1] if wanted[1] else 0
    return x.new_empty(x.shape if wanted[0] else 0), x.new_empty(dbias)


def _save(ctx, inputs, output) -> None:
    x, packed, scales, bias, ctx.epilogue, residual = inputs
    ctx.save_for_backward(x, packed, scales, bias)
    ctx.residual_dtype = None if residual is None else residual.dtype


def _backward(ctx, grad: Tensor):
    needs = inputs_needing_gradient(ctx, 6)
    wanted = [needs[0], needs[3]]
    x, packed, scales, bias = ctx.saved_tensors
    dx, dbias = _linear_fp8_backward(grad, x, packed, scales, bias, ctx.epilogue, wanted)
    dresidual = grad.to(ctx.residual_dtype) if needs[5] else None
    gradients = (dx if needs[0] else None, None, None, dbias if needs[3] else None, None, dresidual)
    return gradients[: len(ctx.needs_input_grad)]


_linear_fp8 = define(
    "linear_fp8(Tensor x, Tensor packed, Tensor scales, Tensor? bias=None, str epilogue='none', "
    "Tensor? residual=None) -> Tensor",
    reference=contiguous(reference.linear_fp8),
    fake=_linear_fp8_fake,
    backward=(_backward, _save),
)

_linear_fp8_backward = define(
    "linear_fp8_backward(Tensor grad, Tensor x, Tensor packed, Tensor scales, Tensor? bias, "
    "str epilogue, bool[2] wanted) -> (Tensor, Tensor)",
    reference=linear_fp8_backward_reference,
    fake=_linear_fp8_backward_fake,
)


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in float8_e4m3fn, its largest value of every row at 448.

    Args:
        weight: (F, C), floating point, any strides.

    Returns:
        packed (F, C) float8_e4m3fn, contiguous, and scales (F,) float32: weight is about
        packed * scales.

    Raises:
        ValueError: weight is not a matrix of a floating-point dtype.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"quantize_fp8: weight must be (F, C) in floating point, got {weight.dtype} of shape "
            f"{tuple(weight.shape)}"
        )
    packed, scales = reference.quantize_rows(weight.detach(), FP8)
    return packed.contiguous(), scales


def dequantize_fp8(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """packed * scales, (F, C) in dtype."""
    return (packed.float() * scales[:, None]).to(dtype)


def linear_fp8(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None = None, epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """residual + epilogue(x @ weight.T + bias) with a weight in float8; see `linear`.

    The weight is a constant: x, bias and residual have gradients, it has none.

    Args:
        x: (..., C), any strides; cast to autocast's dtype under autocast.
        packed: (F, C) float8_e4m3fn, as `quantize_fp8` returned it.
        scales: (F,) float32.
        bias: (F,), the dtype of x, or None.
        epilogue: as in `linear`.
        residual: the shape of the output, added last, or None.

    Returns:
        (..., F), or (..., F / 2) with "swiglu", of the dtype to which x and residual promote,
        contiguous.

    Raises:
        ValueError: shapes or dtypes that do not go together, or an unknown epilogue.
    """
    if packed.dim() != 2 or packed.dtype != FP8:
        raise ValueError(
            f"linear_fp8: packed must be float8_e4m3fn of shape (F, C), got {packed.dtype} of "
            f"shape {tuple(packed.shape)}"
        )
    if scales.shape != packed.shape[:1] or scales.dtype != torch.float32:
        raise ValueError(
            f"linear_fp8: scales must be float32 of shape ({packed.shape[0]},), got "
            f"{scales.dtype} of shape {tuple(scales.shape)}"
        )
    check_operands("linear_fp8", x, packed.shape, x.dtype, bias, epilogue, residual)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):  # the product is not cast again
            return _linear_fp8(x, packed, scales, bias, epilogue, residual)
    return _linear_fp8(x, packed, scales, bias, epilogue, residual)
