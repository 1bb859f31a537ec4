"""The first half of a decoding step's attention in one kernel: norm, projections, rotation, cache.

    q, k, v = n @ weight.T + bias      n = norm_weight * round(x / sqrt(mean(x**2) + eps))
    q, k = rotary(q, k); k and v go to rows `slots` of the cache

For one new position of every row. CUDA C++ rotates the fp32 sums and rounds once; the operators one
after the other round the product too. The weight has any form: wide, int8 or int4.

x is (B, 1, C), weight (3 * 4096, 4096) in QLLaMA: 32 heads of 128, C = 4096. Bound by reading the
weight: F * C * bytes / bandwidth for 1 to 8 rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from internvl_engine import reference

from . import _cuda, _decoding
from ._gemv import (
    PAIRED_ROWS,
    WIDE,
    Norm,
    check_form,
    check_norm,
    input_pointer,
    input_rows,
    weight_of,
)
from ._heads import as_int64, check_rotary, pointer, positions_stride, slots_stride
from ._library import address, define, native_cuda


def decode_qkv_composed(
    x: Tensor, weight: Tensor, scales: Tensor | None, sums: Tensor | None, bias: Tensor | None,
    norm_weight: Tensor | None, squares: Tensor | None, eps: float, heads: int, cos: Tensor,
    sin: Tensor, positions: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor,
) -> Tensor:  # fmt: skip
    """The operators of the norm, of the weight's form and of the rotation, one after the other."""
    key_heads, dim = k_cache.shape[1], k_cache.shape[3]
    if norm_weight is not None:
        x = torch.ops.internvl.rms_norm.default(x, norm_weight, eps)
    held = weight_of((weight, scales, sums), (heads + 2 * key_heads) * dim, x.shape[-1])
    q, k, v = split_heads(held.product(x, bias), heads, key_heads, dim)
    rest = (cos, sin, positions, slots, k_cache, v_cache)
    return torch.ops.internvl.rotary_append.default(q, k, v, *rest).contiguous()


def decode_qkv_cuda(
    x: Tensor, weight: Tensor, scales: Tensor | None, sums: Tensor | None, bias: Tensor | None,
    norm_weight: Tensor | None, squares: Tensor | None, eps: float, heads: int, cos: Tensor,
    sin: Tensor, positions: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor,
) -> Tensor:  # fmt: skip
    """Calls csrc/cuda/decode_qkv.cu."""
    key_heads, dim = k_cache.shape[1], k_cache.shape[3]
    held = weight_of((weight, scales, sums), (heads + 2 * key_heads) * dim, x.shape[-1])
    rows = input_rows(x, held, bias)
    if rows is None or x.shape[1] != 1 or dim % (16 if held.form == WIDE else PAIRED_ROWS):
        return NotImplemented
    q = x.new_empty((x.shape[0], heads, 1, dim))
    read = input_pointer(rows, None if norm_weight is None else Norm(norm_weight, squares, eps))
    cos, sin = cos.contiguous(), sin.contiguous()
    positions, slots = as_int64(positions), as_int64(slots)
    native_cuda.decode_qkv(
        _cuda.TYPES[x.dtype], read.numbers, read.eps, held.pointer(), address(bias),
        (heads, key_heads, dim, cos.data_ptr(), sin.data_ptr(), positions.data_ptr(),
         positions_stride(positions), slots.data_ptr(), slots_stride(slots), q.data_ptr()),
        pointer(k_cache), pointer(v_cache), _cuda.stream(),
    )  # fmt: skip
    return q


def _reference(
    x: Tensor, weight: Tensor, scales: Tensor | None, sums: Tensor | None, bias: Tensor | None,
    norm_weight: Tensor | None, squares: Tensor | None, eps: float, heads: int, cos: Tensor,
    sin: Tensor, positions: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor,
) -> Tensor:  # fmt: skip
    """`_decoding.norm_linear`, and `reference.rotary_append` of its heads."""
    key_heads, dim = k_cache.shape[1], k_cache.shape[3]
    held = weight_of((weight, scales, sums), (heads + 2 * key_heads) * dim, x.shape[-1])
    qkv = _decoding.norm_linear(x, held.dense(x.dtype), bias, "none", norm_weight, squares, eps)
    q, k, v = split_heads(qkv, heads, key_heads, dim)
    rest = (cos, sin, positions, slots, k_cache, v_cache)
    return reference.rotary_append(q, k, v, *rest).contiguous()


def split_heads(qkv: Tensor, heads: int, key_heads: int, dim: int) -> tuple[Tensor, ...]:
    """q, k and v, (B, H, S, D) each, of (B, S, F)."""
    parts = qkv.unflatten(-1, (-1, dim)).transpose(1, 2)
    return parts.split((heads, key_heads, key_heads), dim=1)


def _fake(x, weight, scales, sums, bias, norm_weight, squares, eps, heads, *rest) -> Tensor:
    return x.new_empty((x.shape[0], heads, x.shape[1], rest[-1].shape[3]))


_decode_qkv = define(
    "decode_qkv(Tensor x, Tensor weight, Tensor? scales, Tensor? sums, Tensor? bias,"
    " Tensor? norm_weight, Tensor? squares, float eps, int heads, Tensor cos, Tensor sin,"
    " Tensor positions, Tensor slots, Tensor(a!) k_cache, Tensor(b!) v_cache) -> Tensor",
    reference=_reference,
    fake=_fake,
    cpu={"composed": decode_qkv_composed},
    # The operators by themselves until a measurement on a GPU says otherwise.
    cuda={"composed": decode_qkv_composed, "cuda": decode_qkv_cuda},
)


def decode_qkv(
    x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, heads: int, cos: Tensor, sin: Tensor,
    positions: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor,
    norm_weight: Tensor | None = None, squares: Tensor | None = None, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """Projects the norm of x to q, k and v, rotates q and k, and appends k and v to the cache.

    Args:
        x: (B, S, C); the CUDA kernel takes S = 1 and up to 8 rows.
        weight: what its form consists of, as in `norm_linear`: F = (heads + 2 * Hk) * D rows, those
            of q, then of k, then of v; Hk and D are those of the caches.
        bias: (F,), the dtype of x, or None.
        heads: of q.
        cos, sin, positions, slots, k_cache, v_cache: as in `rotary_append`.
        norm_weight, squares, eps: as in `norm_linear`.

    Returns:
        Rotated q, (B, heads, S, D), contiguous.

    Raises:
        ValueError: shapes or dtypes that do not go together, or an input that requires a gradient.
        IndexError: a position or slot outside its table, on the CPU; a GPU cannot tell.
    """
    caches = (k_cache, v_cache)
    if x.dim() != 3 or any(cache.dim() != 4 or cache.stride(-1) != 1 for cache in caches):
        raise ValueError(
            f"decode_qkv: x must be (B, S, C) and the caches (B, H, T, D) with adjacent elements, "
            f"got {tuple(x.shape)}, {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    batch, key_heads, _, dim = k_cache.shape
    held = weight_of(weight, (heads + 2 * key_heads) * dim, x.shape[-1])
    check_form("decode_qkv", x, held)
    check_norm("decode_qkv", x, norm_weight, squares)
    q, k = (x.new_empty(1).expand(len(x), n, x.shape[1], dim) for n in (heads, key_heads))
    check_rotary("decode_qkv", q, k, cos, sin, positions)
    one_kind = k_cache.shape == v_cache.shape and k_cache.dtype == v_cache.dtype == x.dtype
    if batch != x.shape[0] or not one_kind or slots.shape not in (x.shape[1:2], x.shape[:2]):
        raise ValueError(
            f"decode_qkv: caches must be ({x.shape[0]}, H, T, D) of {x.dtype} and slots "
            f"({x.shape[1]},) or {tuple(x.shape[:2])}, got {tuple(k_cache.shape)} {k_cache.dtype}, "
            f"{tuple(v_cache.shape)} {v_cache.dtype} and {tuple(slots.shape)}"
        )
    parts = (*held.parts, None, None)[:3]
    rest = (cos, sin, positions, slots, k_cache, v_cache)
    return _decode_qkv(x, *parts, bias, norm_weight, squares, eps, heads, *rest)
