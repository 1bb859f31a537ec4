"""Attention and MLP of LLaMAs that are not our own, on the fused operators.

    q, k, v = x Wqkv                 one product; k and v may have fewer heads
    q, k = rotary(q, k)              with the cache's write, where it is a KVCache
    attention(q, k, v) Wo            or by the function that the model's configuration names
    swiglu(x Wgu) Wd

The layers around them, their norms, masks and caches stay what they are.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from .attention import Angles, Heads, attend, rotate
from .base import FusedModule, holds

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEARS = {"qkv": PROJECTIONS[:3], "o": PROJECTIONS[3:]}
# What the layers pass on to the attention function, which "sdpa" does not read.
UNREAD = ("position_ids", "use_cache", "cache_position")
CACHES = ("past_key_values", "cache")  # of transformers 4.56 to 5.23, and from 5.24 on
# What a class tells the attention function beside.
WINDOWS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "MistralAttention": lambda a: {"sliding_window": getattr(a.config, "sliding_window", None)},
    "Qwen2Attention": lambda a: {"sliding_window": a.sliding_window},
}


def is_silu(activation: Any) -> bool:
    """Whether a module is the activation of SwiGLU."""
    return type(activation).__name__ in ("SiLU", "SiLUActivation")


class FusedLlamaAttention(FusedModule):
    """transformers' LlamaAttention and its twins of Mistral and Qwen2."""

    LINEARS = LINEARS
    ARGUMENTS = frozenset(
        ("self", "hidden_states", "position_embeddings", "attention_mask", *CACHES,
         "cache_position", "kwargs")
    )  # fmt: skip

    @classmethod
    def matches(cls, module: Any) -> bool:
        known = (*PROJECTIONS, "head_dim", "num_key_value_groups", "scaling", "layer_idx", "config")
        return holds(module, *known)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        more = [name for name, _ in module.named_children() if name not in PROJECTIONS]
        if more:
            return f"it holds {', '.join(more)} beside its projections"
        more = sorted(set(signature(type(module).forward).parameters) - cls.ARGUMENTS)
        if more:
            return f"its forward takes {', '.join(more)}, which is unknown here"
        return None

    def compute(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """(B, S, C) to (B, S, C) and, from "eager" attention, the probabilities (B, H, S, T).

        Where every channel of a head is rotated.
        """
        if position_embeddings is None or position_embeddings[0].shape[-1] != self.head_dim:
            return NotImplemented
        cos, sin = position_embeddings
        told: dict[str, Any] = {}
        if _cache_name(self.eager_class) == "cache":
            past_key_values = kwargs.pop("cache", past_key_values)
            told = {"kwargs": kwargs}
        elif cache_position is not None:  # transformers 4
            told = {"cache_kwargs": {"cos": cos, "sin": sin, "cache_position": cache_position}}
        q, k, v = self._project(hidden_states)
        wide = torch.promote_types(q.dtype, cos.dtype)  # they differ under autocast
        angles = _angles(cos.to(wide), sin.to(wide))
        heads = Heads(q.to(wide), k.to(wide), v)
        heads = rotate(heads, angles, past_key_values, self.layer_idx, **told)
        output, probabilities = self._attend(heads, attention_mask, kwargs)
        return self.product("o")(output.flatten(2)), probabilities

    def _project(self, hidden_states: Tensor) -> Heads:
        """Views of one product."""
        heads = self.product("qkv")(hidden_states).unflatten(-1, (-1, self.head_dim))
        heads = heads.transpose(1, 2)
        count = heads.shape[1] // (self.num_key_value_groups + 2)
        return Heads(*heads.split((heads.shape[1] - 2 * count, count, count), 1))

    def _attend(
        self, heads: Heads, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The output (B, S, H, D), and the probabilities where the attention function has them."""
        function = self.config._attn_implementation
        dropout = self.attention_dropout if self.training else 0.0
        is_plain = mask is None and not dropout and all(name in UNREAD for name in kwargs)
        one_dtype = heads.q.dtype == heads.k.dtype == heads.v.dtype
        if function == "sdpa" and is_plain and one_dtype:
            output = self._operator(*heads)
            if output is not None:
                return output, None
        attention = self._attention_function(function)
        window = WINDOWS.get(type(self).__name__, lambda attention: {})(self)
        return attention(
            self, *heads, mask, dropout=dropout, scaling=self.scaling, **window, **kwargs
        )

    def _attention_function(self, name: str | None) -> Callable:
        if name in ("eager", None):
            return import_module(type(self).__module__).eager_attention_forward
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        return ALL_ATTENTION_FUNCTIONS[name]

    def _operator(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        """What "sdpa" computes without a mask, or None where the operators do not."""
        queries, keys = q.shape[2], k.shape[2]
        if kernels.unsupported_head_dim(q.shape[3]):
            return None
        if queries == 1 and not torch.is_grad_enabled():
            return kernels.decode_attention(q, k, v, scale=self.scaling).transpose(1, 2)
        if self.is_causal and 1 < queries != keys:
            return None
        kind = "causal" if self.is_causal and queries > 1 else "full"
        return kernels.attention(q, k, v, kind, scale=self.scaling).transpose(1, 2)


class FusedPublishedAttention(FusedModule):
    """LlamaAttention as the published QLLaMA, and LLaMA code of its time, has it.

    With an additive mask, its own rotary tables, and a pair of tensors for a cache.
    """

    LINEARS = LINEARS
    COMPUTED = ("rotary_emb",)

    @classmethod
    def matches(cls, module: Any) -> bool:
        named = type(module).__name__ == "LlamaAttention"
        return named and holds(module, *PROJECTIONS, "rotary_emb", "head_dim")

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        if not type(module.rotary_emb).__name__.endswith("LlamaRotaryEmbedding"):
            return f"its rotary embedding is {type(module.rotary_emb).__name__}"
        if getattr(module, "num_key_value_groups", 1) != 1:
            return "its keys have fewer heads than its queries"
        return kernels.unsupported_head_dim(module.head_dim)

    @classmethod
    def example_inputs(cls, module: Any, draw: Callable[..., Tensor]) -> tuple:
        return (
            draw(2, 17, module.q_proj.in_features),
            None,
            torch.arange(17, dtype=torch.int64, device="cpu").expand(2, 17),
        )

    def compute(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Any = None,
        past_key_value: tuple[Tensor, Tensor] | None = None,
        output_attentions: bool = False,
        use_cache: bool = False,
    ) -> Any:
        """(B, S, C) to the same, None, and the keys and values (B, H, T, D) of all positions where
        use_cache."""
        if output_attentions or position_ids is None:
            return NotImplemented
        qkv = self.product("qkv")(hidden_states).unflatten(-1, (3, -1, self.head_dim))
        q, k, v = qkv.transpose(1, 3).unbind(2)
        past = 0 if past_key_value is None else past_key_value[0].shape[2]
        tables = self.rotary_emb(v, seq_len=past + k.shape[2])  # (1, 1, P, D), the halves alike
        cos, sin = (table.flatten(0, -2)[:, : self.head_dim // 2] for table in tables)
        q, k = kernels.rotary(q, k, cos, sin, position_ids)
        if past_key_value is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(past_key_value, (k, v), strict=True))
        elif use_cache:
            v = v.contiguous()  # a view would keep q and k in memory for as long
        attended = attend(Heads(q, k, v), attention_mask).transpose(1, 2)
        output = self.product("o")(attended.flatten(2))
        return output, None, (k, v) if use_cache else None


class FusedLlamaMLP(FusedModule):
    """Any LLaMA's MLP: down(silu(gate(x)) * up(x)), gate and up as one product."""

    LINEARS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
    COMPUTED = ("act_fn",)

    @classmethod
    def matches(cls, module: Any) -> bool:
        return holds(module, "gate_proj", "up_proj", "down_proj", "act_fn")

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        if not is_silu(module.act_fn):
            return f"its activation is {type(module.act_fn).__name__}, not SiLU"
        return None

    @classmethod
    def example_inputs(cls, module: Any, draw: Callable[..., Tensor]) -> tuple:
        return (draw(2, 17, module.gate_proj.in_features),)

    def compute(self, x: Tensor) -> Tensor:
        return self.product("down")(self.product("gate_up")(x, "swiglu"))


@cache
def _cache_name(eager: type) -> str:
    """What a class of attention calls its cache."""
    parameters = signature(eager.forward).parameters  # type: ignore[attr-defined]
    return next((name for name in CACHES if name in parameters), CACHES[0])


def _angles(cos: Tensor, sin: Tensor) -> Angles:
    """transformers' cos and sin (B or 1, S, D) as the rotary operator takes them: a row a token."""
    rows, tokens, dim = cos.shape
    positions = torch.arange(rows * tokens, dtype=torch.int64, device=cos.device).view(rows, tokens)
    # The second half of a head's angles is the first again.
    cos, sin = (x[..., : dim // 2].reshape(rows * tokens, -1) for x in (cos, sin))
    return Angles(cos, sin, positions)
