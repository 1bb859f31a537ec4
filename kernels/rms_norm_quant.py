"""RMSNorm whose result is rows of eight bits, each with a scale: the input of a quantized product.

    z = x * weight        q = round(z * limit / max |z|)        scale = max |z| / limit * rstd

rstd = 1 / sqrt(mean(x**2) + eps) is one number a row, so it goes into the row's scale, and the row
is rounded once, from fp32. limit is 127 for int8 and 448 for float8_e4m3fn. q * scale is about
rms_norm(x, weight, eps).

x is (..., C); C is 3200 in the vision tower and 4096 in QLLaMA. Bound by memory: reads two bytes a
value and writes one.
"""

import torch
from torch import Tensor

from internvl_engine import reference

from ._library import contiguous, define, triton_launcher
from ._norms import check_weight

QUANTIZED = (torch.int8, torch.float8_e4m3fn)

_rms_norm_quant = define(
    "rms_norm_quant(Tensor x, Tensor weight, float eps, ScalarType dtype) -> (Tensor, Tensor)",
    reference=contiguous(reference.rms_norm_quant),
    fake=lambda x, weight, eps, dtype: (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(x.shape[:-1], dtype=torch.float32),
    ),
    cuda={"triton": triton_launcher("rms_norm_quant")},
    differentiable=False,
)


def rms_norm_quant(
    x: Tensor, weight: Tensor, eps: float = 1e-6, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[Tensor, Tensor]:
    """RMSNorm, rounded to eight bits with one scale a row.

    Args:
        x: (..., C), any strides; float32, float16 or bfloat16.
        weight: (C,), the dtype of x, or float32 with 16-bit x.
        eps: added to the mean square.
        dtype: torch.int8 or torch.float8_e4m3fn.

    Returns:
        q (..., C) in dtype, and scales (...) float32, contiguous: rms_norm(x, weight, eps) is about
        q * scales.

    Raises:
        ValueError: weight does not go with x, another dtype, or an input that requires a gradient.
    """
    check_weight("rms_norm_quant", x, weight)
    check_quantized("rms_norm_quant", dtype)
    return _rms_norm_quant(x, weight, eps, dtype)


def check_quantized(operator: str, dtype: torch.dtype) -> None:
    """Raises ValueError for a dtype to which no row is quantized."""
    if dtype not in QUANTIZED:
        raise ValueError(f"{operator}: dtype must be one of {QUANTIZED}, got {dtype}")
