"""A decoding step of QLLaMA in four products a layer, its norms absorbed in what reads them.

    q      = decode_qkv(h, s)        norm, q, k and v, rotation, the cache's write
    h, s   = linear_squares(attend(q) Wo + h)      s: sums of squares, the next norm's statistic
    a      = norm_linear(h, s)       norm, gate and up, SwiGLU
    h, s   = linear_squares(a Wd + h)

The CUDA kernels of these operators take up to 8 rows and are launched one behind the other without
gaps (csrc/cuda/gemv.cuh). Nobody has measured them on a GPU yet, so the step is taken where they
are asked for: `kernels.prefer("decode_qkv", "cuda")`, and the same of the other two.

B rows, C width
"""

from typing import Any

import torch
from torch import Tensor

from .. import kernels
from .attention import Heads, attend
from .norm import epsilon, normalize

MAX_ROWS = 8
GROUPS = ("qkv", "o", "gate_up", "down")


def is_preferred(hidden: Tensor) -> bool:
    """Whether somebody asked for the CUDA kernels on the device of the states."""
    order = kernels.backends("decode_qkv").get(hidden.device.type.upper(), ["reference"])
    return order[0] == "cuda"


def takes(decoder: Any, hidden: Tensor, cache: Any, vision: Any) -> bool:
    """Whether states (B, 1, C) are one step that only appends to a static cache."""
    if not is_preferred(hidden) or torch.compiler.is_compiling() or vision is not None:
        return False
    appends = getattr(cache, "is_static", False) and hidden.shape[1] == 1
    return (
        appends and len(hidden) <= MAX_ROWS and all(_fits(each, hidden) for each in decoder.layers)
    )


def _fits(layer: Any, hidden: Tensor) -> bool:
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    one_dtype = all(norm.weight.dtype == hidden.dtype for norm in norms)
    if not one_dtype or any(epsilon(norm) is None for norm in norms):
        return False
    return all(layer.parts_of(group) is not None for group in GROUPS)


def step(
    decoder: Any, hidden: Tensor, mask: Any, positions: Tensor, tables: tuple[Tensor, Tensor],
    cache: Any,
) -> Tensor:  # fmt: skip
    """The last norm of the states (B, 1, C) behind all layers.

    Args:
        decoder: a fused LlamaModel that `takes` them.
        hidden: embeddings of the new tokens.
        mask: AttentionMask with the lengths of the rows.
        positions: (B, 1).
        tables: cos and sin.
        cache: a StaticCache, which is written to.
    """
    squares = None
    for layer in decoder.layers:
        qkv, o, gate_up, down = (layer.parts_of(group) for group in GROUPS)
        held = cache.layers[layer.layer_idx]
        cached: tuple[Any, ...] = (positions, held.slots, held.keys, held.values)
        norm: tuple[Any, ...] = _norm(layer.input_layernorm, squares)
        q = kernels.decode_qkv(
            hidden, qkv.weight, qkv.bias, layer.self_attn.num_heads, *tables, *cached, *norm
        )
        attended = attend(Heads(q, held.keys, held.values), mask).transpose(1, 2).flatten(2)
        hidden, squares = kernels.linear_squares(attended, o.weight, o.features, o.bias, hidden)
        norm = _norm(layer.post_attention_layernorm, squares)
        active = kernels.norm_linear(
            hidden, gate_up.weight, gate_up.features, gate_up.bias, "swiglu", *norm
        )
        rest = (down.weight, down.features, down.bias)
        hidden, squares = kernels.linear_squares(active, *rest, hidden)
    return normalize(decoder.norm, hidden)


def _norm(norm: Any, squares: Tensor | None) -> tuple[Any, ...]:
    return norm.weight, squares, epsilon(norm)
