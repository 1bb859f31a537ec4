"""Joins what several parts of the keys gave to the same queries (FlashDecoding's second kernel).

Source: Dao, Haziza, Massa, Sizov, Flash-Decoding (PyTorch blog, 2023).
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_core import LOG2E, lse_dtype


@triton.jit
def _combine_kernel(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, rows, parts,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """One program joins the parts (parts, rows, D) of one row, weighted by their sums."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_P)
    columns = tl.arange(0, BLOCK_D)
    places = part.to(tl.int64) * rows + row
    lse = tl.load(partial_lse_ptr + places, mask=part < parts, other=float("-inf"))
    largest = tl.max(lse, axis=0)
    weight = tl.exp2((lse - largest).to(tl.float32) * LOG2E)
    total = tl.sum(weight, axis=0)
    mask = (part < parts)[:, None] & (columns < D)[None, :]
    out = tl.load(partial_ptr + places[:, None] * D + columns[None, :], mask=mask, other=0.0)
    out = tl.sum(out * weight[:, None], axis=0) / total
    tl.store(out_ptr + row * D + columns, out.to(out_ptr.dtype.element_ty), mask=columns < D)
    if LSE:
        dtype: tl.constexpr = lse_ptr.dtype.element_ty
        tl.store(lse_ptr + row, largest + tl.log2(total.to(dtype)) / LOG2E)


def partial_outputs(q: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Uninitialised (parts, *q.shape) values and (parts, *q.shape[:-1]) log-sum-exps."""
    out = q.new_empty((parts, *q.shape), dtype=torch.float32)
    return out, q.new_empty((parts, *q.shape[:-1]), dtype=lse_dtype(q.dtype))


def combine(partial: Tensor, partial_lse: Tensor, out: Tensor, lse: Tensor | None) -> None:
    """Writes out (..., D) and, where given, lse (...), both contiguous."""
    D = out.shape[-1]
    parts = partial.shape[0]
    rows = out.numel() // D
    _combine_kernel[(rows,)](
        partial, partial_lse, out, lse, rows, parts, D, triton.next_power_of_2(D),
        triton.next_power_of_2(parts), lse is not None, num_warps=1,
    )  # fmt: skip


@cache
def processors(device: torch.device) -> int:
    """How many programs run at a time; 8 under the interpreter, so that small tests split too."""
    if device.type == "cpu":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


def split_keys(keys: int, block: int, programs: int, device: torch.device) -> tuple[int, int]:
    """(parts, keys a part) so that `programs` a part fill the GPU twice; parts are whole blocks."""
    blocks = triton.cdiv(keys, block)
    wanted = triton.cdiv(2 * processors(device), programs)
    blocks_per_part = triton.cdiv(blocks, min(wanted, blocks, 64))
    return triton.cdiv(blocks, blocks_per_part), blocks_per_part * block
