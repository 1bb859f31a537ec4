"""Rotary embedding of new queries and keys, and the write of keys and values to the KV cache.

The formula is rotary.py's; rotated keys and the values go to rows `slots` of the cache in the same
pass. For inference: the cache is written in place, there is no gradient.

q, k, v are (B, H, S, D) views of any strides but the last, H = 32, D = 128; S = 1 in decoding,
where the time is that of one launch. Bound by memory otherwise: q, k, v are read and written once.
"""

import torch
from torch import Tensor

from internvl_engine import reference

from ._heads import (
    adjacent_pointer,
    as_int64,
    check_rotary,
    empty_heads,
    pointer,
    positions_stride,
    slots_stride,
)
from ._library import NATIVE_TYPES, define, native, triton_launcher


def rotary_append_native(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor,
    k_cache: Tensor, v_cache: Tensor,
) -> Tensor:  # fmt: skip
    """Calls csrc/cpu/rotary.h."""
    dtype = NATIVE_TYPES.get(q.dtype)
    if dtype is None:
        return NotImplemented
    y = empty_heads(q)
    (q, q_heads), (k, k_heads), (v, v_heads) = map(adjacent_pointer, (q, k, v))
    cos, sin = cos.contiguous(), sin.contiguous()
    positions, slots = as_int64(positions), as_int64(slots)
    native.rotary_append(
        dtype, q_heads, k_heads, v_heads, pointer(y), pointer(k_cache), pointer(v_cache),
        cos.data_ptr(), sin.data_ptr(), cos.shape[0], positions.data_ptr(),
        positions_stride(positions), slots.data_ptr(), slots_stride(slots), k_cache.shape[2],
        q.shape, k.shape[1], torch.get_num_threads(),
    )  # fmt: skip
    return y


def _rotary_append_reference(q, k, v, cos, sin, positions, slots, k_cache, v_cache):
    turned = reference.rotary_append(q, k, v, cos, sin, positions, slots, k_cache, v_cache)
    return empty_heads(q).copy_(turned)


_rotary_append = define(
    "rotary_append(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor positions,"
    " Tensor slots, Tensor(a!) k_cache, Tensor(b!) v_cache) -> Tensor",
    reference=_rotary_append_reference,
    fake=lambda q, *_: empty_heads(q),
    cpu={"native": rotary_append_native},
    cuda={"triton": triton_launcher("rotary_append")},
)


def rotary_append(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor,
    k_cache: Tensor, v_cache: Tensor,
) -> Tensor:  # fmt: skip
    """Rotates q and k, writes rotated k and v into the cache at `slots`, returns rotated q.

    Args:
        q, k, v: (B, H, S, D), any strides; k and v may have fewer heads than q; one dtype.
        cos, sin: (P, D / 2), the dtype of q.
        positions: (B, S) or (1, S), integers in [0, P): the angles.
        slots: (S,) or (B, S), integers in [0, T): the cache rows to write, the same in every row
            of the batch or its own. The position of a token is not its slot where a batch is
            padded.
        k_cache, v_cache: (B, H, T, D), the dtype of q, any strides but 1 in the last dimension;
            written in place.

    Returns:
        The rotated q, a new tensor in the memory order of q.

    Raises:
        ValueError: shapes or dtypes that do not go together, or an input that requires a gradient.
        IndexError: a position or slot outside its table, on the CPU; a GPU cannot tell.
    """
    check_rotary("rotary_append", q, k, cos, sin, positions)
    if v.shape != k.shape or v.dtype != k.dtype or slots.shape not in (q.shape[2:3], q.shape[::2]):
        raise ValueError(
            f"rotary_append: v must be as k, {tuple(k.shape)} {k.dtype}, and slots of shape "
            f"({q.shape[2]},) or {tuple(q.shape[::2])}, got {tuple(v.shape)} {v.dtype} and "
            f"{tuple(slots.shape)}"
        )
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        fits = cache.dim() == 4 and cache.shape[:2] == k.shape[:2] and cache.shape[3] == k.shape[3]
        if not fits or cache.dtype != k.dtype or cache.stride(-1) != 1:
            raise ValueError(
                f"rotary_append: {name} must be (B, H, T, D) for k {tuple(k.shape)} {k.dtype} with "
                f"adjacent elements, got {tuple(cache.shape)} {cache.dtype}"
            )
    return _rotary_append(q, k, v, cos, sin, positions, slots, k_cache, v_cache)
