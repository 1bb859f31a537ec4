"""Joins what several parts of the keys gave to the same queries (FlashDecoding's second kernel).

Source: Dao, Haziza, Massa, Sizov, Flash-Decoding (PyTorch blog, 2023).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._heads import lse_dtype
from .._invariance import is_batch_invariant
from ._attention_core import LOG2E
from ._sizes import cdiv, power_of_2, processors
from ._tuning import OPTIONS, Config


@triton.jit(do_not_specialize=["rows", "S", "H", "parts"])
def combine_kernel(
    partial_ptr, partial_lse_ptr, out_ptr, lse_ptr, rows, S, H, parts,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program joins one row (batch, position, head) of the parts, weighted by their sums."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_P)
    columns = tl.arange(0, BLOCK_D)
    place = (row // H // S * H + row % H) * S + row // H % S  # log-sum-exps are (B, H, S)
    part = part.to(tl.int64)
    lse = tl.load(partial_lse_ptr + part * rows + place, mask=part < parts, other=float("-inf"))
    largest = tl.max(lse, axis=0)
    weight = tl.exp2((lse - largest).to(tl.float32) * LOG2E)
    total = tl.sum(weight, axis=0)
    mask = (part < parts)[:, None] & (columns < D)[None, :]
    out = part[:, None] * rows + row
    out = tl.load(partial_ptr + out * D + columns[None, :], mask=mask, other=0.0)
    out = tl.sum(out * weight[:, None], axis=0) * tl.div_rn(1.0, total)
    tl.store(out_ptr + row * D + columns, out.to(out_ptr.dtype.element_ty), mask=columns < D)
    if lse_ptr is not None:
        tl.store(lse_ptr + place, largest + tl.log2(total.to(largest.dtype)) / LOG2E)


def combine_config(shape: dict[str, int]) -> Config:
    """Warps for at most 32 values a thread: 64 parts in one warp would be 256."""
    warps = max(1, shape["BLOCK_P"] * shape["BLOCK_D"] // 1024)
    return {"num_warps": warps, "num_stages": 1} | OPTIONS


def partial_outputs(out: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Uninitialised (parts, B, S, H, D) values and (parts, B, H, S) log-sum-exps."""
    B, H, S, D = out.shape
    partial = out.new_empty((parts, B, S, H, D), dtype=torch.float32)
    return partial, out.new_empty((parts, B, H, S), dtype=lse_dtype(out.dtype))


def combine(partial: Tensor, partial_lse: Tensor | None, out: Tensor, lse: Tensor | None) -> None:
    """Writes out (B, H, S, D), with (B, S, H, D) in memory, and where given lse (B, H, S)."""
    _, H, S, D = out.shape
    parts = partial.shape[0]
    rows = out.numel() // D
    shape = {"D": D, "BLOCK_D": power_of_2(D), "BLOCK_P": power_of_2(parts)}
    combine_kernel[(rows,)](
        partial, partial_lse, out, lse, rows, S, H, parts, **shape, **combine_config(shape)
    )


def split_keys(
    keys: int, block: int, heads: int, programs: int, device: torch.device
) -> tuple[int, int]:
    """(parts, keys a part) so that `programs` a part fill the GPU twice; parts are whole blocks.

    heads: of one row of the batch, which count alone where its bits must not depend on the others.
    """
    blocks = cdiv(keys, block)
    programs = heads if is_batch_invariant() else programs
    wanted = cdiv(2 * processors(device), programs)
    blocks_per_part = cdiv(blocks, min(wanted, blocks, 64))
    return cdiv(blocks, blocks_per_part), blocks_per_part * block
