"""What the attention kernels share: loading tiles and one key block of the online softmax.

Scores are kept in units of log2, so that every exponential is one exp2: with L = log2(e),

    p_ij = 2 ** (L * score_ij - lse_i)        lse_i = log2 sum_j 2 ** (L * score_ij)

Launchers hand log-sum-exps on in natural units, as PyTorch's own operators do.
Sources: Dao, FlashAttention-2 (arXiv 2307.08691); Milakov and Gimelshein (arXiv 1805.02867).
"""

import torch
import triton
import triton.language as tl

from .._heads import MAX_HEAD_DIM
from ._sizes import power_of_2

LOG2E = tl.constexpr(1.4426950408889634)
# Where a running maximum starts: finite, so that 2 ** (-inf - m) is 0 and never NaN.
LOWEST = tl.constexpr(-1.0e30)
# Arguments that vary with the batch or the text: another value must not compile the kernel again.
COUNTS = [
    "image_step", "repeat_step", "H", "S", "M", "T", "prefix", "plane", "tiles", "keys_per_split",
]  # fmt: skip


@triton.jit
def load_tile(
    ptr, rows, row_stride, num_rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(rows, BLOCK_D) of a head: 0 past D and, where MASKED, in rows past num_rows."""
    columns = tl.arange(0, BLOCK_D)
    ptrs = ptr + rows[:, None] * row_stride + columns[None, :]
    if MASKED:
        if D == BLOCK_D:
            return tl.load(ptrs, mask=(rows < num_rows)[:, None], other=0.0)
        return tl.load(ptrs, mask=(rows < num_rows)[:, None] & (columns < D)[None, :], other=0.0)
    if D == BLOCK_D:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(columns < D)[None, :], other=0.0)


@triton.jit
def load_at(ptr, offsets, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D), the row i at offsets[i]; 0 where not valid and past D."""
    columns = tl.arange(0, BLOCK_D)
    ptrs = ptr + offsets[:, None] + columns[None, :]
    if D == BLOCK_D:
        return tl.load(ptrs, mask=valid[:, None], other=0.0)
    return tl.load(ptrs, mask=valid[:, None] & (columns < D)[None, :], other=0.0)


@triton.jit
def store_at(ptr, offsets, valid, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores the valid rows of a tile, the row i at offsets[i], cast to the output's dtype."""
    columns = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (columns < D)[None, :]
    ptrs = ptr + offsets[:, None] + columns[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def packed_rows(rows, image, image_step, repeat_step, key_head, S, GROUP: tl.constexpr):
    """(batch, query head, position) of packed rows: all that read key_head of this image.

    One below the other: by repeat of the image, then by head of its GROUP, then by position.
    """
    block = rows // S
    if GROUP == 1:
        batches = image * image_step + block * repeat_step
        heads = key_head
    else:
        batches = image * image_step + block // GROUP * repeat_step
        heads = key_head * GROUP + block % GROUP
    return batches, heads, rows % S


@triton.jit
def load_row(ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """One row of D values in fp32, 0 past D."""
    columns = tl.arange(0, BLOCK_D)
    return tl.load(ptr + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def product(a, b):
    """a @ b with fp32 accumulation; fp32 operands are multiplied as fp32, not as tf32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def exp2(x, DTYPE: tl.constexpr):
    """2 ** x; for float32 inputs within a unit in the last place.

    The GPU's own exponential may be off by 2, by which float32 gradients would have up to 1.7 times
    the error of eager. 16-bit inputs cannot tell. Polynomial: Cephes, exp2f.
    """
    if DTYPE != tl.float32:
        return tl.exp2(x)
    whole = tl.floor(x + 0.5)
    f = x - whole
    y = tl.fma(f, 1.535336188319500e-4, 1.339887440266574e-3)
    y = tl.fma(y, f, 9.618437357674640e-3)
    y = tl.fma(y, f, 5.550332471162809e-2)
    y = tl.fma(y, f, 2.402264791363012e-1)
    y = tl.fma(y, f, 6.931472028550421e-1)
    y = tl.fma(y, f, 1.0)
    power = ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < -126.0, 0.0, y * power)  # -inf too; NaN stays


@triton.jit
def softmax_block(scores, scale, v, largest, total, acc):
    """Takes one key block into the running (maximum, sum, weighted values) of every query row.

    scores (BLOCK_M, BLOCK_N) times scale > 0 are in units of log2; -inf where a key is not seen.
    """
    new_largest = tl.maximum(largest, tl.max(scores, axis=1) * scale)
    p = exp2(tl.fma(scores, scale, -new_largest[:, None]), v.dtype)
    shrink = exp2(largest - new_largest, v.dtype)
    total = total * shrink + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return new_largest, total, acc


@triton.jit
def log_sum_exp(largest, total, DTYPE: tl.constexpr):
    """In natural units, of scores in units of log2. DTYPE: see lse_dtype in kernels/_heads.py."""
    return (largest.to(DTYPE) + tl.log2(total.to(DTYPE))) / LOG2E


@triton.jit
def load_lse(ptrs, valid):
    """(lse, what fp32 rounds off it) in log2 units; where not valid so large that p is 0."""
    lse = tl.load(ptrs, mask=valid, other=1.0e30) * LOG2E
    high = lse.to(tl.float32)
    if lse.dtype == tl.float64:
        return high, (lse - high).to(tl.float32)
    return high, tl.zeros_like(high)


@triton.jit
def probabilities(scores, scale, lse, lse_low, DTYPE: tl.constexpr):
    """2 ** (scores * scale - lse); the log-sum-exps in two parts, in the shape of the scores."""
    return exp2(tl.fma(scores, scale, -lse) - lse_low, DTYPE)


@triton.jit
def score_gradient(p, v, d_out, delta):
    """d loss / d score, (BLOCK_M, BLOCK_N), of one tile of queries and one block of keys.

    delta = sum(d_out * out) is per query.
    """
    return p * (product(d_out, v.T) - delta[:, None])


@triton.jit
def score_gradient_by_key(p, v, d_out, delta, dv):
    """The same transposed, (BLOCK_N, BLOCK_M), for one tile of keys; also adds to their dv."""
    dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision="ieee")
    return p * (product(v, d_out.T) - delta[None, :]), dv


def tail(rows: int, block: int) -> int:
    """The smallest tile for the rows that whole blocks leave over, 0 where a whole one is as good.

    257 rows in tiles of 128 are two whole tiles and one row: a third whole tile wastes 49 %.
    """
    smallest = max(16, power_of_2(rows % block))  # tl.dot takes 16 rows or more
    return smallest if 0 < rows % block and smallest < block else 0


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """A weight, lengths or a mask as kernels read them; None stays None."""
    return None if x is None else x.contiguous()


def supported(dtype: torch.dtype, D: int) -> bool:
    """Whether the attention kernels compute in this dtype at this head size."""
    return dtype in (torch.bfloat16, torch.float16, torch.float32) and D <= MAX_HEAD_DIM


def width_class(D: int, dtype: torch.dtype) -> str:
    """Whose default configurations serve: a tile's cost depends on D and the bytes of a value."""
    if dtype == torch.float32:
        return "fp32"
    return "wide" if D > 64 else "narrow"


def length_class(length: int) -> int:
    """A length rounded up to a power of two, up to 2048: the tuner's key, not one a length."""
    return min(power_of_2(length), 2048)
