"""The masks of attention as compile-time cases: which keys a query sees (kernels/attention.py)."""

import triton
import triton.language as tl

from internvl_engine.reference import MASKS

FULL = tl.constexpr(MASKS.index("full"))
CAUSAL = tl.constexpr(MASKS.index("causal"))
PREFIX = tl.constexpr(MASKS.index("prefix"))
BLOCK = tl.constexpr(MASKS.index("block"))


@triton.jit
def seen_interval(position, prefix, T, MASK: tl.constexpr):
    """[first, end) of the keys that a query at this position sees, before `key_padding_mask`."""
    if MASK == FULL:
        return position * 0, position * 0 + T
    if MASK == CAUSAL:
        return position * 0, position + 1
    if MASK == PREFIX:
        return position * 0, tl.where(position < prefix, tl.minimum(prefix, T), position + 1)
    first = tl.where(position < prefix, 0, prefix)
    return first, tl.where(position < prefix, tl.minimum(prefix, T), position + 1)


@triton.jit
def see(scores, keys, first, end, key_padding_mask_ptr, T, PADDED: tl.constexpr):
    """scores (rows, keys), -inf where the row does not see the key."""
    seen = (keys[None, :] >= first[:, None]) & (keys[None, :] < end[:, None])
    if PADDED:
        real = tl.load(key_padding_mask_ptr + keys, mask=keys < T, other=0) != 0
        seen = seen & real[None, :]
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def see_by_key(scores, keys, first, end, key_padding_mask_ptr, T, PADDED: tl.constexpr):
    """The same transposed: scores (keys, rows)."""
    seen = (keys[:, None] >= first[None, :]) & (keys[:, None] < end[None, :])
    if PADDED:
        real = tl.load(key_padding_mask_ptr + keys, mask=keys < T, other=0) != 0
        seen = seen & real[:, None]
    return tl.where(seen, scores, float("-inf"))
