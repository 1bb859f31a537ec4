"""Quantized weights where they lie in panels, in Triton: what linear_int8 and linear_int4 share.

A weight is (P, S, 32, 4) bytes, panels of 32 rows cut into steps of 4 bytes a row (kernels/_int8.py
and kernels/_int4.py): the bytes that a tile of 32 rows reads are one contiguous range. Tiles are
multiplied as (weight tile) @ (x tile).T: the matrix unit takes its first operand from registers,
where the weight is widened, and so nothing is written back to shared memory.
"""

import triton
import triton.language as tl

PANEL_ROWS = tl.constexpr(32)
STEP_BYTES = tl.constexpr(4)


@triton.jit
def panel_starts(features, steps):
    """Where the rows (int32) of a weight start, in bytes."""
    panels = (features // PANEL_ROWS).to(tl.int64) * steps * (PANEL_ROWS * STEP_BYTES)
    return panels + features % PANEL_ROWS * STEP_BYTES


@triton.jit
def panel_bytes(columns):
    """Where byte `columns` of a row lies behind its start."""
    return columns // STEP_BYTES * (PANEL_ROWS * STEP_BYTES) + columns % STEP_BYTES
