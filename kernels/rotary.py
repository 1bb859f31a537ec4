"""Rotary position embedding of queries and keys, rotate-half.

    y[j] = x[j] cos_j - x[j + D/2] sin_j        y[j + D/2] = x[j + D/2] cos_j + x[j] sin_j

with the angle of the token's position. In fp32, rounded once; the published model rounds each
product. The gradient is the rotation by the opposite angle. Source: apply_rotary_pos_emb in
OpenGVLab/InternVL, modeling_qllama.py.

q and k are (B, H, S, D) views of any strides but the last, H = 32, D = 128: slices of a merged qkv
projection are read in place. The outputs have the order of their memory. Bound by memory: one read
and one write of q and k.
"""

import torch
from torch import Tensor

from internvl_engine import reference

from . import _cuda
from ._heads import adjacent, as_int64, check_rotary, empty_heads, pointer, positions_stride
from ._library import NATIVE_TYPES, define, native, native_cuda, triton_launcher


def rotary_native(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Calls csrc/cpu/rotary.h."""
    dtype = NATIVE_TYPES.get(q.dtype)
    if dtype is None:
        return NotImplemented
    cos, sin, positions = cos.contiguous(), sin.contiguous(), as_int64(positions)
    outputs = []
    for x in (q, k):
        y, x = empty_heads(x), adjacent(x)
        native.rotary(
            dtype, pointer(x), pointer(y), cos.data_ptr(), sin.data_ptr(), cos.shape[0],
            positions.data_ptr(), positions_stride(positions), -1.0 if inverse else 1.0, x.shape,
            torch.get_num_threads(),
        )  # fmt: skip
        outputs.append(y)
    return outputs[0], outputs[1]


def rotary_cuda(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Calls csrc/cuda/rotary.cu."""
    dtype = _cuda.TYPES.get(q.dtype)
    q_out, k_out = empty_heads(q), empty_heads(k)
    cos, sin, positions = cos.contiguous(), sin.contiguous(), as_int64(positions)
    tables = (cos.data_ptr() | sin.data_ptr()) % 16 == 0
    if dtype is None or not tables or not _cuda.aligned_heads(q, k, q_out, k_out):
        return NotImplemented
    if q.numel() > 0 or k.numel() > 0:
        native_cuda.rotary(
            dtype, pointer(q), pointer(k), pointer(q_out), pointer(k_out), cos.data_ptr(),
            sin.data_ptr(), positions.data_ptr(), positions_stride(positions),
            -1.0 if inverse else 1.0, q.shape, k.shape[1], _cuda.stream(),
        )  # fmt: skip
    return q_out, k_out


def _rotary_reference(q, k, cos, sin, positions, inverse=False):
    turned = reference.rotary(q, k, cos, -sin if inverse else sin, positions)
    like_inputs = [empty_heads(x).copy_(y) for x, y in zip((q, k), turned, strict=True)]
    return like_inputs[0], like_inputs[1]


def _save(ctx, inputs, output) -> None:
    _, _, cos, sin, positions, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx, grad_q, grad_k):
    return (*_rotary(grad_q, grad_k, *ctx.saved_tensors, not ctx.inverse), None, None, None, None)


_rotary = define(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor positions, bool inverse=False)"
    " -> (Tensor, Tensor)",
    reference=_rotary_reference,
    fake=lambda q, k, *_: (empty_heads(q), empty_heads(k)),
    cpu={"native": rotary_native},
    cuda={"triton": triton_launcher("rotary"), "cuda": rotary_cuda},
    backward=(_backward, _save),
)


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotates element j of every head with element j + D/2 by the angle of the token's position.

    Args:
        q, k: (B, H, S, D), any strides, the number of heads may differ; float32, float16, bfloat16.
        cos, sin: (P, D / 2) from `reference.rotary_table`, the dtype of q, or another with which q
            and k promote, as under autocast. Constants: no gradient.
        positions: (B, S) or (1, S), integers in [0, P).

    Returns:
        The rotated q and k, new tensors, in the memory order of q and k.

    Raises:
        ValueError: shapes or dtypes that do not go together.
        IndexError: a position outside the table, on the CPU; a GPU cannot tell.
    """
    if cos.dtype != q.dtype and q.dtype == k.dtype and cos.dtype == sin.dtype:
        dtype = torch.promote_types(q.dtype, cos.dtype)
        q, k, cos, sin = (x.to(dtype) for x in (q, k, cos, sin))
    check_rotary("rotary", q, k, cos, sin, positions)
    return _rotary(q, k, cos, sin, positions)
