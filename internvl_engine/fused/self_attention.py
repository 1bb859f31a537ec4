"""What transformers' self-attentions of LLaMA's kind compute behind their projections.

    q, k = norm(q), norm(k)          of each head, in Qwen3
    q, k = rotary(q, k)              with the cache's write, where it is a KVCache
    attention(q, k, v)               or by the function that the model's configuration names

Masks arrive ready-made, as tensors of queries by keys; caches and what else a layer passes on stay
what they are.

B batch, S queries, T keys, H and Hk heads, D head size
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from inspect import Signature, signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import kernels
from .attention import Angles, Heads, attend, rotate
from .norm import normalize

CACHES = ("past_key_values", "cache")  # of transformers 4.56 to 5.23, and from 5.24 on
OTHER_CACHES = ("past_key_value", *CACHES)  # what a class calls it too, with a warning
# What the layers pass on to the attention function, which "sdpa" does not read.
UNREAD = ("position_ids", "use_cache", "cache_position", "num_items_in_batch")
# What a class tells the attention function beside.
TOLD: dict[str, Callable[[Any], dict[str, Any]]] = {
    "MistralAttention": lambda a: {"sliding_window": getattr(a.config, "sliding_window", None)},
    "Phi3Attention": lambda a: {"sliding_window": getattr(a.config, "sliding_window", None)},
    "Qwen2Attention": lambda a: {"sliding_window": a.sliding_window},
    "Qwen3Attention": lambda a: {"sliding_window": a.sliding_window},
    "Qwen3MoeAttention": lambda a: {"sliding_window": a.sliding_window},
    "GptOssAttention": lambda a: {"sliding_window": a.sliding_window, "s_aux": a.sinks},
}


class Call(NamedTuple):
    """The arguments of a layer or its attention, whatever this transformers calls them."""

    position_embeddings: Any  # cos and sin, (B or 1, S, D), or D / 2 wide
    mask: Tensor | None  # (B or 1, H or 1, S, T or longer), bool or additive
    cache: Any
    cache_position: Tensor | None  # transformers 4
    others: dict[str, Any]  # for the attention function


def read_call(
    eager: Any, hidden_states: Tensor, args: tuple, kwargs: dict[str, Any]
) -> Call | None:
    """The arguments behind the states of a call of eager.forward; None where something is amiss."""
    if args:
        try:
            bound = _signature(eager).bind(None, hidden_states, *args, **kwargs).arguments
        except TypeError:
            return None
        kwargs = {**bound, **bound.get("kwargs", {})}
        for name in ("self", "hidden_states", "kwargs"):
            kwargs.pop(name, None)
    others = dict(kwargs)
    embeddings, mask = others.pop("position_embeddings", None), others.pop("attention_mask", None)
    past = others.pop(cache_name(eager), None)
    named = "cache_position" in _signature(eager).parameters
    position = others.pop("cache_position", None) if named else None
    if embeddings is None or any(name in others for name in OTHER_CACHES):
        return None
    return Call(embeddings, mask, past, position, others)


def self_attend(
    attention: Any, eager: Any, qkv: Tensor, call: Call, tells: bool
) -> tuple[Tensor, Tensor | None] | None:
    """The attention of one layer, between its projections.

    Args:
        attention: the eager module, or the fused one, for its settings and norms.
        eager: its eager class.
        qkv: (B, S, (H + 2 Hk) * D), the projections next to each other.
        call: what the layer was given.
        tells: whether the probabilities are wanted where the attention function has them.

    Returns:
        The output (B, S, H, D) and the probabilities (B, H, S, T) or None; None for all of it where
        not every channel of a head is rotated.
    """
    cos, sin = call.position_embeddings
    dim, halves = attention.head_dim, eager.__name__ == "GptOssAttention"
    if cos.shape[-1] * (1 + halves) != dim:
        return None
    told: dict[str, Any] = {}
    if cache_name(eager) == "cache":
        told = {"kwargs": call.others}
    elif call.cache_position is not None:  # transformers 4
        told = {"cache_kwargs": {"cos": cos, "sin": sin, "cache_position": call.cache_position}}
    q, k, v = _split(attention, qkv)
    wide = torch.promote_types(q.dtype, cos.dtype)  # they differ under autocast
    angles = _angles(cos.to(wide), sin.to(wide), dim // 2)
    heads = rotate(
        Heads(q.to(wide), k.to(wide), v), angles, call.cache, attention.layer_idx, **told
    )
    return _attend(attention, eager, heads, call, tells)


def _split(attention: Any, qkv: Tensor) -> Heads:
    """Views of one product, (B, H, S, D) each, normed where the class does."""
    heads = qkv.unflatten(-1, (-1, attention.head_dim))
    count = heads.shape[2] // (attention.num_key_value_groups + 2)
    sizes = heads.shape[2] - 2 * count, count, count
    if "q_norm" not in attention._modules:
        return Heads(*heads.transpose(1, 2).split(sizes, 1))
    q, k, v = heads.split(sizes, 2)
    q, k = normalize(attention.q_norm, q), normalize(attention.k_norm, k)
    return Heads(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


def _attend(
    attention: Any, eager: Any, heads: Heads, call: Call, tells: bool
) -> tuple[Tensor, Tensor | None]:
    function = attention.config._attn_implementation
    dropout = attention.attention_dropout if attention.training else 0.0
    is_plain = not dropout and all(
        name in UNREAD or value is None for name, value in call.others.items()
    )
    one_dtype = heads.q.dtype == heads.k.dtype == heads.v.dtype
    told = TOLD.get(eager.__name__, lambda attention: {})(attention)
    if is_plain and one_dtype and "s_aux" not in told:
        if function == "sdpa" or (function in ("eager", None) and not tells):
            output = _operator(attention, heads, call, function == "sdpa")
            if output is not None:
                return output.transpose(1, 2), None
    run = _attention_function(eager, function)
    return run(
        attention, *heads, call.mask, dropout=dropout, scaling=attention.scaling, **told,
        **call.others,
    )  # fmt: skip


def _operator(attention: Any, heads: Heads, call: Call, is_sdpa: bool) -> Tensor | None:
    """What "sdpa" or "eager" computes, (B, H, S, D), or None where the operators do not."""
    (q, k, v), mask = heads, call.mask
    if kernels.unsupported_head_dim(q.shape[3]):
        return None
    queries, keys, scale = q.shape[2], k.shape[2], attention.scaling
    if getattr(call.cache, "is_static", False):  # its lengths say what the mask says
        return kernels.decode_attention(q, k, v, call.cache.lengths, scale=scale)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            return None
        return attend(heads, mask[..., :keys], scale)
    if queries == 1 and not torch.is_grad_enabled():
        return kernels.decode_attention(q, k, v, scale=scale)
    if not (is_sdpa and attention.is_causal and queries > 1):  # "eager" hides nothing by itself
        return kernels.attention(q, k, v, scale=scale)
    if queries < keys:  # a cache of fixed size, still empty: SDPA's mask starts at the upper left
        k, v = k[:, :, :queries], v[:, :, :queries]
    return kernels.attention(q, k, v, "causal", scale=scale) if queries <= keys else None


def _attention_function(eager: Any, name: str | None) -> Callable:
    if name in ("eager", None):
        return import_module(eager.__module__).eager_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[name]


@cache
def _signature(eager: Any) -> Signature:
    return signature(eager.forward)


@cache
def cache_name(eager: Any) -> str:
    """What a class calls its cache."""
    return next((name for name in CACHES if name in _signature(eager).parameters), CACHES[0])


def _angles(cos: Tensor, sin: Tensor, half: int) -> Angles:
    """transformers' cos and sin (B or 1, S, D) as the rotary operator takes them: a row a token."""
    rows, tokens, _ = cos.shape
    positions = torch.arange(rows * tokens, dtype=torch.int64, device=cos.device).view(rows, tokens)
    # The second half of a head's angles is the first again.
    cos, sin = (x[..., :half].reshape(rows * tokens, half) for x in (cos, sin))
    return Angles(cos, sin, positions)
