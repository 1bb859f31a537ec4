"""What the fused self-attentions share: rotary positions with the cache's write, and masks."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import kernels, reference
from ..modeling.masks import AttentionMask


class Angles(NamedTuple):
    """cos and sin, (P, D / 2), and the rows of them to take: positions (B or 1, S)."""

    cos: Tensor
    sin: Tensor
    positions: Tensor


class Heads(NamedTuple):
    """q (B, H, S, D), k and v (B, Hk, T, D); Hk divides H."""

    q: Tensor
    k: Tensor
    v: Tensor


def rotate(
    heads: Heads, angles: Angles, cache: Any, layer_idx: int, *args: Any, **kwargs: Any
) -> Heads:
    """Rotates q and k and appends k and v to the cache, in one pass where that is a KVCache.

    Args:
        heads: of the new positions, T = S.
        angles: of the new positions.
        cache: a transformers Cache or None.
        layer_idx: the layer's place in the cache.
        args, kwargs: what else the cache's `update` is told.

    Returns:
        Rotated q, and the keys and values of all positions.
    """
    q, k, v = heads
    appends = hasattr(cache, "rotary_append") and q.dtype == v.dtype == angles.cos.dtype
    if appends and not (torch.is_grad_enabled() and q.requires_grad):
        return Heads(*cache.rotary_append(q, k, v, *angles, layer_idx))
    q, k = kernels.rotary(q, k, *angles)
    if cache is not None:
        k, v = cache.update(k, v, layer_idx, *args, **kwargs)
    return Heads(q, k, v)


def attend(heads: Heads, mask: Tensor | AttentionMask | None, scale: float | None = None) -> Tensor:
    """Self-attention under a described mask or one that is a tensor, see `attention_with_mask`."""
    q, k, v = heads
    if q.dtype != v.dtype:  # autocast leaves the rotated ones in the dtype of the tables
        q, k = q.to(v.dtype), k.to(v.dtype)
    if mask is None:
        return kernels.attention(q, k, v, scale=scale)
    if isinstance(mask, AttentionMask):
        if q.shape[2] == 1 and mask.kind != "block" and not torch.is_grad_enabled():
            return kernels.decode_attention(q, k, v, mask.lengths, mask.key_padding_mask, scale)
        kind = "full" if mask.is_open else mask.kind
        return kernels.attention(q, k, v, kind, mask.prefix, mask.key_padding_mask, scale)
    on_gpu = mask.device.type != "cpu"
    if not torch.is_grad_enabled() or not (mask.requires_grad or on_gpu and q.requires_grad):
        return kernels.attention_with_mask(q, k, v, mask, scale)
    k, v = (reference.repeat_heads(x, q.shape[1]) for x in (k, v))  # for the gradient of SDPA
    mask = mask if mask.dtype == torch.bool else mask.clamp(min=torch.finfo(q.dtype).min)
    return nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)
