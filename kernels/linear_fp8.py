"""The linear layer with a weight in eight-bit floating point, one scale a row.

    y = residual + epilogue(x @ (packed * scales).T + bias)      epilogue: one of _epilogue.py

packed is (F, C) float8_e4m3fn, row-major: three bits of mantissa, at most 448. scales is (F,)
float32. The reference widens the weight and leaves x as it is: right everywhere and fast nowhere.

GPUs from compute capability 8.9 on multiply fp8 by fp8: rows of x are quantized too, by gelu_quant
with the epilogue "none", or come quantized from rms_norm_quant and gelu_quant (`linear_fp8_rows`);
both scales meet the fp32 sum. torch._scaled_mm takes q (M, C) row-major, the weight as (C, F)
column-major, scales (M, 1) and (1, F) and multiples of 16 for C and F, and returns bfloat16: what
it rounds off is a sixteenth of what x lost. Hopper's fast accumulation keeps 14 bits of a sum of
128 products, of which three bits of mantissa leave nothing to see. Source: _scaled_mm_out_cuda in
PyTorch, aten/src/ATen/native/cuda/ScaledBlas.cpp.

x is (M, C); (C, F) as in linear.py. A quarter of the bytes of fp32, half of those of bf16.
"""

import torch
from torch import Tensor

from internvl_engine import reference

from . import _cuda
from ._epilogue import apply_epilogue, output_shape
from ._invariance import is_batch_invariant
from ._library import contiguous, define
from ._linear import define_linear
from .linear import check_computed_in, check_operands

FP8 = torch.float8_e4m3fn


def linear_fp8_reference(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None = None, epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Widens the weight and computes with it, in fp32."""
    if not is_batch_invariant():
        return reference.linear_fp8(x, packed, scales, bias, epilogue, residual)
    weight, wide = dequantize_fp8(packed, scales, torch.float32), x.float()
    bias = None if bias is None else bias.float()
    y = torch.ops.internvl.linear.default(wide, weight, bias, epilogue, residual)
    return y.to(x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))


def linear_fp8_scaled_mm(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None = None, epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Quantizes the rows of x, then torch._scaled_mm."""
    if not _scaled_mm_serves(x, packed):
        return NotImplemented
    q, q_scales = torch.ops.internvl.gelu_quant.default(x, FP8, "none")
    return linear_fp8_rows_scaled_mm(
        q, q_scales, packed, scales, x.dtype, bias, epilogue, residual
    )  # fmt: skip


def linear_fp8_rows_scaled_mm(
    q: Tensor, q_scales: Tensor, packed: Tensor, scales: Tensor, dtype: torch.dtype,
    bias: Tensor | None = None, epilogue: str = "none", residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """torch._scaled_mm, then the activation, then the add."""
    if not _scaled_mm_serves(q, packed):
        return NotImplemented
    added = bias if bias is not None and bias.dtype == torch.bfloat16 else None
    y = torch._scaled_mm(
        q.reshape(-1, q.shape[-1]).contiguous(), packed.contiguous().t(),
        q_scales.reshape(-1, 1).contiguous(), scales.view(1, -1).contiguous(), bias=added,
        out_dtype=torch.bfloat16, use_fast_accum=True,
    ).to(dtype)  # fmt: skip
    if bias is not None and added is None:
        y = y + bias
    return apply_epilogue(y.view(*q.shape[:-1], -1), epilogue, residual)


def _scaled_mm_serves(x: Tensor, packed: Tensor) -> bool:
    """Whether torch._scaled_mm takes these shapes on this GPU. It chooses its tiles by the rows."""
    features, channels = packed.shape
    sixteens = channels % 16 == features % 16 == 0 and x.numel() > 0
    return sixteens and not is_batch_invariant() and _cuda.has_fp8(x.device)


_linear_fp8 = define_linear(
    "linear_fp8",
    "Tensor packed, Tensor scales",
    features=lambda packed, scales: packed.shape[0],
    dense=lambda packed, scales, columns, dtype: dequantize_fp8(packed, scales, dtype),
    reference=linear_fp8_reference,
    cuda={"scaled_mm": linear_fp8_scaled_mm},
)

_linear_fp8_rows = define(
    "linear_fp8_rows(Tensor q, Tensor q_scales, Tensor packed, Tensor scales, ScalarType dtype, "
    "Tensor? bias=None, str epilogue='none', Tensor? residual=None) -> Tensor",
    reference=contiguous(reference.linear_fp8_rows),
    fake=lambda q, q_scales, packed, scales, dtype, bias=None, epilogue="none", residual=None: (
        q.new_empty(output_shape(q, packed.shape[0], epilogue), dtype=dtype)
    ),
    cuda={"scaled_mm": linear_fp8_rows_scaled_mm},
    differentiable=False,
)


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight in float8_e4m3fn, its largest value of every row at 448.

    Args:
        weight: (F, C), floating point, any strides.

    Returns:
        packed (F, C) float8_e4m3fn, contiguous, and scales (F,) float32: weight is about
        packed * scales.

    Raises:
        ValueError: weight is not a matrix of a floating-point dtype, or has NaN or infinity.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"quantize_fp8: weight must be (F, C) in floating point, got {weight.dtype} of shape "
            f"{tuple(weight.shape)}"
        )
    packed, scales = reference.quantize_rows(weight.detach(), FP8)
    if not bool(scales.isfinite().all()):
        raise ValueError("quantize_fp8: the weight has NaN or infinite values")
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
        x: (..., C), float32, bfloat16 or float16, any strides; cast to autocast's dtype under
            autocast.
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
    check_computed_in("linear_fp8", x)
    _check_weight("linear_fp8", packed, scales)
    check_operands("linear_fp8", x, packed.shape, x.dtype, bias, epilogue, residual)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):  # the product is not cast again
            return _linear_fp8(x, packed, scales, bias, epilogue, residual)
    return _linear_fp8(x, packed, scales, bias, epilogue, residual)


def linear_fp8_rows(
    q: Tensor, q_scales: Tensor, packed: Tensor, scales: Tensor, dtype: torch.dtype,
    bias: Tensor | None = None, epilogue: str = "none", residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`linear_fp8` of rows that are quantized already, by rms_norm_quant or gelu_quant.

    Args:
        q: (..., C) float8_e4m3fn.
        q_scales: (...) float32.
        packed: (F, C) float8_e4m3fn, as `quantize_fp8` returned it.
        scales: (F,) float32.
        dtype: of the result, of bias and of residual.
        bias: (F,), or None.
        epilogue: as in `linear`.
        residual: the shape of the output, added last, or None.

    Returns:
        (..., F), or (..., F / 2) with "swiglu", in dtype, contiguous.

    Raises:
        ValueError: shapes or dtypes that do not go together, an unknown epilogue, or an input that
            requires a gradient.
    """
    operator = "linear_fp8_rows"
    _check_weight(operator, packed, scales)
    if q.dtype != FP8 or q_scales.shape != q.shape[:-1] or q_scales.dtype != torch.float32:
        raise ValueError(
            f"{operator}: q must be float8_e4m3fn (..., C) and q_scales float32 (...), got "
            f"{q.dtype} of shape {tuple(q.shape)} and {q_scales.dtype} of shape "
            f"{tuple(q_scales.shape)}"
        )
    check_operands(operator, q, packed.shape, FP8, None, epilogue, residual)
    if bias is not None and (bias.shape, bias.dtype) != (scales.shape, dtype):
        raise ValueError(
            f"{operator}: bias must be {dtype} of shape {tuple(scales.shape)}, got {bias.dtype} of "
            f"shape {tuple(bias.shape)}"
        )
    if residual is not None and residual.dtype != dtype:
        raise ValueError(f"{operator}: residual must be {dtype}, got {residual.dtype}")
    return _linear_fp8_rows(q, q_scales, packed, scales, dtype, bias, epilogue, residual)


def _check_weight(operator: str, packed: Tensor, scales: Tensor) -> None:
    if packed.dim() != 2 or packed.dtype != FP8:
        raise ValueError(
            f"{operator}: packed must be float8_e4m3fn of shape (F, C), got {packed.dtype} of "
            f"shape {tuple(packed.shape)}"
        )
    if scales.shape != packed.shape[:1] or scales.dtype != torch.float32:
        raise ValueError(
            f"{operator}: scales must be float32 of shape ({packed.shape[0]},), got "
            f"{scales.dtype} of shape {tuple(scales.shape)}"
        )
