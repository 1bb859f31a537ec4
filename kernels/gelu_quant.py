"""Activations whose result is rows of eight bits, each with a scale: the input of a quantized
product.

    y = epilogue(x)        q = round(y * limit / max |y|)        scale = max |y| / limit

in fp32 up to the one rounding. The epilogues are those of _epilogue.py; "none" quantizes rows as
they are. limit is 127 for int8 and 448 for float8_e4m3fn.

x is (..., C), (..., 2C) with SwiGLU; C is 12,800 in the vision tower and 11,008 in QLLaMA. Bound by
memory: reads two bytes a value and writes one.
"""

import torch
from torch import Tensor

from internvl_engine import reference

from ._epilogue import EPILOGUES, output_shape
from ._library import contiguous, define, triton_launcher
from .rms_norm_quant import check_quantized


def _fake(x: Tensor, dtype: torch.dtype, epilogue: str = "gelu") -> tuple[Tensor, Tensor]:
    q = x.new_empty(output_shape(x, x.shape[-1], epilogue), dtype=dtype)
    return q, x.new_empty(x.shape[:-1], dtype=torch.float32)


_gelu_quant = define(
    "gelu_quant(Tensor x, ScalarType dtype, str epilogue='gelu') -> (Tensor, Tensor)",
    reference=contiguous(reference.gelu_quant),
    fake=_fake,
    cuda={"triton": triton_launcher("gelu_quant")},
    differentiable=False,
)


def gelu_quant(
    x: Tensor, dtype: torch.dtype = torch.float8_e4m3fn, epilogue: str = "gelu"
) -> tuple[Tensor, Tensor]:
    """GELU, or another epilogue of `linear`, rounded to eight bits with one scale a row.

    Args:
        x: (..., C), or (..., 2C) with "swiglu", any strides; float32, float16 or bfloat16.
        dtype: torch.int8 or torch.float8_e4m3fn.
        epilogue: as in `linear`; "none" quantizes the rows as they are.

    Returns:
        q (..., C) in dtype, and scales (...) float32, contiguous: the activation is about
        q * scales.

    Raises:
        ValueError: another dtype, an unknown epilogue, or an input that requires a gradient.
    """
    check_quantized("gelu_quant", dtype)
    if epilogue not in EPILOGUES or (epilogue == "swiglu" and x.shape[-1] % 2):
        raise ValueError(
            f"gelu_quant: epilogue must be in {EPILOGUES}, swiglu for an even last dimension; got "
            f"{epilogue!r} for {tuple(x.shape)}"
        )
    return _gelu_quant(x, dtype, epilogue)
