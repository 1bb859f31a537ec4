"""What the row-wise kernels share."""

import torch
import triton
import triton.language as tl


@triton.jit
def row_offsets(rows, inner, outer_stride, inner_stride):
    """Where rows (int32) start, in elements: kernels/_rows.py. 64 bits: 671,089 rows of 3200."""
    outer = (rows // inner).to(tl.int64) * outer_stride
    return outer + (rows % inner).to(tl.int64) * inner_stride


@triton.jit
def add_exactly(total, lost, term):
    """Kahan's sum: (total + term, what rounding lost); thousands of rows cost one rounding.

    A plain fp32 sum over the rows of a large batch has several times the error of eager PyTorch.
    """
    term -= lost
    new_total = total + term
    return new_total, (new_total - total) - term


def tile(cols: int, elements: int) -> dict[str, int]:
    """BLOCK_C that covers a row, and as many rows as fill about `elements`, at most 16.

    More rows would be added up plainly, before Kahan's sum, in the gradients of the weights.
    """
    block = triton.next_power_of_2(max(cols, 16))
    return {"BLOCK_R": max(1, min(elements // block, 16)), "BLOCK_C": block}


def persistent_programs(device: torch.device, tiles: int, per_processor: int) -> int:
    """How many programs loop over the tiles; few under the interpreter, so that they do loop."""
    if device.type == "cpu":
        return min(tiles, 2)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(tiles, processors * per_processor)
