"""What the fused self-attentions share: rotary positions with the cache's write, and masks."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels, reference
from ..modeling.masks import AttentionMask

MAX_HEAD_DIM = 128

Three = tuple[Tensor, Tensor, Tensor]


def head_dim_objection(head_dim: int) -> str | None:
    """Why the attention operators cannot take heads so wide, or None."""
    if head_dim > MAX_HEAD_DIM or head_dim % 8:
        return f"its heads are {head_dim} wide; the kernels take multiples of 8 up to 128"
    return None


def rotate(
    q: Tensor, k: Tensor, v: Tensor, angles: Three, cache: Any, layer_idx: int, *more: Any
) -> Three:
    """Rotates q and k and appends k and v to the cache, in one pass where that is a KVCache.

    Args:
        q, k, v: (B, H, S, D). angles: cos and sin, (P, D / 2), and positions, (B or 1, S).
        cache: a transformers Cache or None. more: what else its `update` is told.

    Returns:
        rotated q, and the keys and values of all positions.
    """
    appends = hasattr(cache, "rotary_append") and q.dtype == v.dtype == angles[0].dtype
    if appends and not (torch.is_grad_enabled() and q.requires_grad):
        return cache.rotary_append(q, k, v, *angles, layer_idx)
    q, k = kernels.rotary(q, k, *angles)
    if cache is not None:
        k, v = cache.update(k, v, layer_idx, *more)
    return q, k, v


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | AttentionMask | None) -> Tensor:
    """Self-attention under a described or a ready mask: q (B, H, S, D) to (B, H, S, D)."""
    if q.dtype != v.dtype:  # autocast leaves the rotated ones in the dtype of the tables
        q, k = q.to(v.dtype), k.to(v.dtype)
    if mask is None:
        return kernels.attention(q, k, v)
    if isinstance(mask, AttentionMask):
        if q.shape[2] == 1 and mask.kind != "block" and not torch.is_grad_enabled():
            return kernels.decode_attention(q, k, v, None, mask.visible)  # the last sees all
        kind = "full" if mask.is_open else mask.kind
        return kernels.attention(q, k, v, kind, mask.prefix, mask.visible)
    if mask.device.type == "cpu":  # where SDPA takes 2 to 6 times as long in bfloat16
        return reference.masked_attention(q, k, v, mask)[0]
    mask = mask.clamp(min=torch.finfo(q.dtype).min)
    return nn.functional.scaled_dot_product_attention(q, k, v, mask)
