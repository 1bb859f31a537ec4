"""What the row-wise kernels share."""

import torch
import triton
import triton.language as tl

from ._sizes import power_of_2, processors


@triton.jit
def row_offsets(rows, inner, outer_stride, inner_stride):
    """Where rows (int32) start, in elements: kernels/_rows.py. 64 bits: 671,089 rows of 3200."""
    outer = (rows // inner).to(tl.int64) * outer_stride
    return outer + (rows % inner).to(tl.int64) * inner_stride


@triton.jit
def reciprocal_rms(x, C, eps):
    """1 / sqrt(mean(x**2) + eps) of every row (rows, 1); x is 0 past the C columns.

    Divided as IEEE has it: `/` is off by up to 2 units in the last place on a GPU, which all
    values of a row would share.
    """
    mean = tl.div_rn(tl.sum(x * x, axis=1)[:, None], tl.cast(C, tl.float32))
    return tl.rsqrt(mean + eps)


@triton.jit
def centre(x, mask, C):
    """x less the mean of every row (rows, 1) over the C columns, and 0 outside of mask.

    In two steps, so that the rounding of the first mean does not stay in rows far from zero.
    """
    C = tl.cast(C, tl.float32)
    x = tl.where(mask, x - tl.div_rn(tl.sum(x, axis=1)[:, None], C), 0.0)
    return tl.where(mask, x - tl.div_rn(tl.sum(x, axis=1)[:, None], C), 0.0)


@triton.jit
def add_exactly(total, lost, term):
    """Kahan's sum: (total + term, what rounding lost); thousands of rows cost one rounding.

    A plain fp32 sum over the rows of a large batch has several times the error of eager PyTorch.
    """
    term -= lost
    new_total = total + term
    return new_total, (new_total - total) - term


def empty_rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised, contiguous, of the shape of x; in half the time of torch.empty."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def tile(cols: int, elements: int) -> dict[str, int]:
    """BLOCK_C that covers a row, and as many rows as fill about `elements`, at most 16.

    More rows would be added up plainly, before Kahan's sum, in the gradients of the weights.
    """
    block = power_of_2(max(cols, 16))
    return {"BLOCK_R": max(1, min(elements // block, 16)), "BLOCK_C": block}


def persistent_programs(device: torch.device, tiles: int, per_processor: int) -> int:
    """How many programs loop over the tiles; few under the interpreter, so that they do loop."""
    return min(tiles, 2 if device.type == "cpu" else processors(device) * per_processor)
