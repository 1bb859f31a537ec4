"""Rows in eight bits with a scale each, in Triton: what rms_norm_quant and gelu_quant share.

A row is in registers from its only read on: its largest value is known before it is rounded.
"""

import torch
import triton
import triton.language as tl

from .._cuda import has_fp8
from ._sizes import power_of_2
from ._tuning import ARCHITECTURES, Config

# 16 values a thread of rows of 3200 and 4096, 32 of 12,800. Not yet measured on a GPU.
DEFAULTS: dict[str, Config] = {name: {"num_warps": 8} for name in ARCHITECTURES}
DEFAULTS_LONG: dict[str, Config] = {name: {"num_warps": 16} for name in ARCHITECTURES}
CANDIDATES: list[Config] = [{"num_warps": warps} for warps in (4, 8, 16, 32)]
MAX_COLS = 16384  # beyond, a row no longer fits the registers; the next backend serves
KINDS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
TO_NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves no bit behind the point


def defaults(cols: int) -> dict[str, Config]:
    """By the length of a row."""
    return DEFAULTS_LONG if cols > 8192 else DEFAULTS


def serves(x: torch.Tensor, cols: int, dtype: torch.dtype) -> bool:
    """Whether the kernels take x, rows of `cols` values after the activation, to this dtype."""
    if x.dtype == torch.float64 or cols > MAX_COLS or dtype not in KINDS:
        return False
    return dtype == torch.int8 or x.device.type == "cpu" or has_fp8(x.device)


def block(cols: int) -> int:
    """BLOCK_C that covers a row."""
    return power_of_2(max(cols, 16))


@triton.jit
def store_quantized(q_ptr, scales_ptr, row, y, mask, cols, C, factor, LIMIT: tl.constexpr):
    """Rounds one row y, 0 outside of mask; its scale is multiplied by factor."""
    largest = tl.max(tl.abs(y), axis=0)
    largest = tl.where(largest == 0.0, LIMIT, largest)
    y = y * tl.div_rn(LIMIT, largest)
    y = tl.minimum(tl.maximum(y, -LIMIT), LIMIT)
    if q_ptr.dtype.element_ty == tl.int8:
        y = (y + TO_NEAREST) - TO_NEAREST
    tl.store(q_ptr + row * C + cols, y.to(q_ptr.dtype.element_ty), mask=mask)
    tl.store(scales_ptr + row, tl.div_rn(largest, LIMIT) * factor)
