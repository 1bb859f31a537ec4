"""The gradient of attention in Triton: two kernels, no atomics.

One tile of queries walks over the keys it sees (delta and dq), then one tile of keys walks over the
rows that see it (dk and dv). Rows are packed as kernels/triton/attention.py says, so the gradients
of keys that several batches or heads share are summed inside the walk. Probabilities are recomputed
from the log-sum-exp; a row that sees nothing (-infinity) has 1 / T for every key.
"""

import triton
import triton.language as tl

from ._attention_core import (
    COUNTS,
    LOG2E,
    load_at,
    load_lse,
    load_tile,
    packed_rows,
    probabilities,
    product,
    score_gradient_by_key,
    store_at,
)
from ._attention_masks import BLOCK, CAUSAL, FULL, see, see_by_key, seen_interval


@triton.jit
def _probabilities(
    q, k_ptr, v_ptr, key_padding_mask_ptr, d_out, lse, lse_low, alike, first, end, start, k_stride,
    v_stride, T, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """(p, d loss / d p, k) of the keys [start, start + BLOCK_N); p = alike = 1 / T where a row
    sees nothing."""
    keys = start + tl.arange(0, BLOCK_N)
    k = load_tile(k_ptr, keys, k_stride, T, D, BLOCK_D, MASKED=True)
    v = load_tile(v_ptr, keys, v_stride, T, D, BLOCK_D, MASKED=True)
    scores = see(product(q, k.T), keys, first, end, key_padding_mask_ptr, T, PADDED)
    p = probabilities(scores, scale * LOG2E, lse[:, None], lse_low[:, None], v.dtype)
    if PADDED:
        p = tl.where((lse == float("-inf"))[:, None], tl.where(keys < T, alike, 0.0)[None, :], p)
    return p, product(d_out, v.T), k


@triton.jit
def _queries_tile(
    q_ptr, k_ptr, v_ptr, key_padding_mask_ptr, out_ptr, d_out_ptr, lse_ptr, delta_ptr, dq_ptr,
    image, image_step, repeat_step, key_head, first_row, q_batch_stride, q_head_stride, q_stride,
    k_stride, v_stride, H, S, M, T, prefix, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """delta and dq of BLOCK_M packed rows of one key head."""
    rows = first_row + tl.arange(0, BLOCK_M)
    valid = rows < M
    batches, head, positions = packed_rows(rows, image, image_step, repeat_step, key_head, S, GROUP)
    places = (batches * H + head) * S + positions
    offsets = ((batches * S + positions) * H + head) * D
    q_rows = batches * q_batch_stride + head * q_head_stride + positions * q_stride
    q = load_at(q_ptr, q_rows, valid, D, BLOCK_D)
    d_out = load_at(d_out_ptr, offsets, valid, D, BLOCK_D)
    delta = load_at(out_ptr, offsets, valid, D, BLOCK_D).to(tl.float32) * d_out.to(tl.float32)
    delta = tl.sum(delta, axis=1)
    lse, lse_low = load_lse(lse_ptr + places, valid)
    alike = tl.div_rn(1.0, T.to(tl.float32))
    first, end = seen_interval(T - S + positions, prefix, T, MASK)
    low = tl.min(tl.where(valid, first, T), axis=0)
    high = tl.max(tl.where(valid, end, 0), axis=0)
    if PADDED:  # a row that sees nothing attends to every key alike
        some = tl.min(lse, axis=0) == float("-inf")
        low, high = tl.where(some, 0, low), tl.where(some, T, high)
    if q_ptr.dtype.element_ty == tl.float32:
        # With few keys, fp32 rounding of sum(d_out * out) outweighs that of the probabilities.
        delta *= 0.0
        for start in range(low, high, BLOCK_N):
            p, d_p, _ = _probabilities(
                q, k_ptr, v_ptr, key_padding_mask_ptr, d_out, lse, lse_low, alike, first, end,
                start, k_stride, v_stride, T, scale, D, BLOCK_D, BLOCK_N, PADDED,
            )  # fmt: skip
            delta += tl.sum(p * d_p, axis=1)
    tl.store(delta_ptr + places, delta, mask=valid)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(low, high, BLOCK_N):
        p, d_p, k = _probabilities(
            q, k_ptr, v_ptr, key_padding_mask_ptr, d_out, lse, lse_low, alike, first, end, start,
            k_stride, v_stride, T, scale, D, BLOCK_D, BLOCK_N, PADDED,
        )  # fmt: skip
        d_scores = p * (d_p - delta[:, None])
        dq = tl.dot(d_scores.to(k.dtype), k, dq, input_precision="ieee")
    store_at(dq_ptr, offsets, valid, dq * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=COUNTS)
def queries_kernel(
    q_ptr, k_ptr, v_ptr, key_padding_mask_ptr, out_ptr, d_out_ptr, lse_ptr, delta_ptr, dq_ptr,
    q_batch_stride, q_head_stride, q_stride, k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride, image_step, repeat_step,
    H, S, M, T, prefix, scale, tiles,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MASK: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program: delta and dq of BLOCK_M, or TAIL_M, packed rows of one key head."""
    tile = tl.program_id(0) % tiles
    key_head = (tl.program_id(0) // tiles % (H // GROUP)).to(tl.int64)
    image = (tl.program_id(0) // tiles // (H // GROUP)).to(tl.int64)
    k_ptr += image * k_batch_stride + key_head * k_head_stride
    v_ptr += image * v_batch_stride + key_head * v_head_stride
    if PADDED:
        key_padding_mask_ptr += image * T
    if TAIL_M == 0 or tile < tiles - 1:
        _queries_tile(
            q_ptr, k_ptr, v_ptr, key_padding_mask_ptr, out_ptr, d_out_ptr, lse_ptr, delta_ptr,
            dq_ptr, image, image_step, repeat_step, key_head, tile * BLOCK_M, q_batch_stride,
            q_head_stride, q_stride, k_stride, v_stride, H, S, M, T, prefix, scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, MASK, PADDED, GROUP,
        )  # fmt: skip
    else:
        _queries_tile(
            q_ptr, k_ptr, v_ptr, key_padding_mask_ptr, out_ptr, d_out_ptr, lse_ptr, delta_ptr,
            dq_ptr, image, image_step, repeat_step, key_head, tile * BLOCK_M, q_batch_stride,
            q_head_stride, q_stride, k_stride, v_stride, H, S, M, T, prefix, scale,
            D, BLOCK_D, TAIL_M, BLOCK_N, MASK, PADDED, GROUP,
        )  # fmt: skip


@triton.jit
def _rows_that_see(
    lse_ptr, first_key, end_key, S, rows, T, prefix, MASK: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """[low, high) of `rows` rows that see alike, with a key in [first_key, end_key) or seeing
    nothing. lse_ptr is that of the first."""
    low = 0
    high = rows
    if MASK != FULL:  # they are one batch and head: positions, shifted by T - S
        low = tl.maximum(first_key - (T - S), 0)
        if MASK != CAUSAL:
            low = tl.where(first_key < prefix, 0, low)
        if MASK == BLOCK:
            high = tl.where(end_key > prefix, S, tl.maximum(tl.minimum(prefix, T) - (T - S), 0))
        if PADDED:
            for start in range(0, S, 256):
                positions = start + tl.arange(0, 256)
                lse = tl.load(lse_ptr + positions, mask=positions < S, other=0.0)
                empty = lse == float("-inf")
                low = tl.minimum(low, tl.min(tl.where(empty, positions, S), axis=0))
                high = tl.maximum(high, tl.max(tl.where(empty, positions + 1, 0), axis=0))
    return low, high


@triton.jit
def _keys_tile(
    q_ptr, k_ptr, v_ptr, key_padding_mask_ptr, d_out_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    image, image_step, repeat_step, key_head, first_key, q_batch_stride, q_head_stride, q_stride,
    k_stride, v_stride, H, S, M, T, prefix, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dk and dv of the keys [first_key, first_key + BLOCK_N) of one key head."""
    keys = first_key + tl.arange(0, BLOCK_N)
    k = load_tile(k_ptr, keys, k_stride, T, D, BLOCK_D, MASKED=True)
    v = load_tile(v_ptr, keys, v_stride, T, D, BLOCK_D, MASKED=True)
    alike = tl.div_rn(1.0, T.to(tl.float32))
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    block = M  # of rows that see alike: all of them, or those of one batch and head
    if MASK != FULL:
        block = S
    for first_row in range(0, M, block):
        batch, head, _ = packed_rows(first_row, image, image_step, repeat_step, key_head, S, GROUP)
        low, high = _rows_that_see(
            lse_ptr + (batch * H + head) * S, first_key, tl.minimum(first_key + BLOCK_N, T), S,
            block, T, prefix, MASK, PADDED,
        )  # fmt: skip
        for start in range(first_row + low, first_row + high, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            valid = rows < first_row + high
            batches, heads, positions = packed_rows(
                rows, image, image_step, repeat_step, key_head, S, GROUP
            )
            places = (batches * H + heads) * S + positions
            offsets = ((batches * S + positions) * H + heads) * D
            q_rows = batches * q_batch_stride + heads * q_head_stride + positions * q_stride
            q = load_at(q_ptr, q_rows, valid, D, BLOCK_D)
            d_out = load_at(d_out_ptr, offsets, valid, D, BLOCK_D)
            delta = tl.load(delta_ptr + places, mask=valid, other=0.0)
            lse, lse_low = load_lse(lse_ptr + places, valid)
            scores = product(k, q.T)
            if MASK != FULL or PADDED:
                first, end = seen_interval(T - S + positions, prefix, T, MASK)
                scores = see_by_key(scores, keys, first, end, key_padding_mask_ptr, T, PADDED)
            p = probabilities(scores, scale * LOG2E, lse[None, :], lse_low[None, :], v.dtype)
            if PADDED:
                p = tl.where((lse == float("-inf"))[None, :], alike, p)
            d_scores, dv = score_gradient_by_key(p, v, d_out, delta, dv)
            dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision="ieee")
    store_at(dk_ptr, keys * (H // GROUP) * D, keys < T, dk * scale, D, BLOCK_D)
    store_at(dv_ptr, keys * (H // GROUP) * D, keys < T, dv, D, BLOCK_D)


@triton.jit(do_not_specialize=COUNTS)
def keys_kernel(
    q_ptr, k_ptr, v_ptr, key_padding_mask_ptr, d_out_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    q_batch_stride, q_head_stride, q_stride, k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride, image_step, repeat_step,
    H, S, M, T, prefix, scale, tiles,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr,
    BLOCK_M: tl.constexpr, MASK: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of BLOCK_N, or TAIL_N, keys of one key head of one image."""
    tile = tl.program_id(0) % tiles
    key_heads = H // GROUP
    key_head = (tl.program_id(0) // tiles % key_heads).to(tl.int64)
    image = (tl.program_id(0) // tiles // key_heads).to(tl.int64)
    k_ptr += image * k_batch_stride + key_head * k_head_stride
    v_ptr += image * v_batch_stride + key_head * v_head_stride
    dk_ptr += (image * T * key_heads + key_head) * D
    dv_ptr += (image * T * key_heads + key_head) * D
    if PADDED:
        key_padding_mask_ptr += image * T
    if TAIL_N == 0 or tile < tiles - 1:
        _keys_tile(
            q_ptr, k_ptr, v_ptr, key_padding_mask_ptr, d_out_ptr, lse_ptr, delta_ptr, dk_ptr,
            dv_ptr, image, image_step, repeat_step, key_head, tile * BLOCK_N, q_batch_stride,
            q_head_stride, q_stride, k_stride, v_stride, H, S, M, T, prefix, scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, MASK, PADDED, GROUP,
        )  # fmt: skip
    else:
        _keys_tile(
            q_ptr, k_ptr, v_ptr, key_padding_mask_ptr, d_out_ptr, lse_ptr, delta_ptr, dk_ptr,
            dv_ptr, image, image_step, repeat_step, key_head, tile * BLOCK_N, q_batch_stride,
            q_head_stride, q_stride, k_stride, v_stride, H, S, M, T, prefix, scale,
            D, BLOCK_D, BLOCK_M, TAIL_N, MASK, PADDED, GROUP,
        )  # fmt: skip
