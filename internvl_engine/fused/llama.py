"""Attention and MLP of LLaMAs that are not our own, on the fused operators.

    q, k, v = x Wqkv                 one product; k and v may have fewer heads
    q, k = rotary(q, k)              with the cache's write, where it is a KVCache
    attention(q, k, v) Wo            or by the function that the model's configuration names
    swiglu(x Wgu) Wd

The layers around them, their norms, masks and caches stay what they are.
"""

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import kernels
from .attention import Three, attend, head_dim_objection, rotate
from .base import FusedModule, holds, same_arguments
from .projection import Projection
from .sharing import Shared

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def _window_of_config(attention: Any) -> dict[str, Any]:
    return {"sliding_window": getattr(attention.config, "sliding_window", None)}


def _own_window(attention: Any) -> dict[str, Any]:
    return {"sliding_window": attention.sliding_window}


# The classes of transformers that compute this, and what each tells the attention function beside.
FAMILY: dict[str, Callable[[Any], dict[str, Any]]] = {
    "transformers.models.llama.modeling_llama.LlamaAttention": lambda attention: {},
    "transformers.models.mistral.modeling_mistral.MistralAttention": _window_of_config,
    "transformers.models.qwen2.modeling_qwen2.Qwen2Attention": _own_window,
}
# What the layers pass on to the attention function, which "sdpa" does not read.
UNREAD = ("position_ids", "use_cache", "cache_position")


class FusedLlamaAttention(FusedModule):
    """In place of transformers' LlamaAttention and its twins of Mistral and Qwen2."""

    ARGUMENTS = frozenset(
        ("self", "hidden_states", "position_embeddings", "attention_mask", "past_key_values",
         "cache_position", "kwargs")
    )  # fmt: skip

    def __init__(self, eager: Any, inference: bool) -> None:
        super().__init__(eager, inference)
        self.angles = Shared()
        self._family = _name_of(eager)
        self._eager_function = import_module(type(eager).__module__).eager_attention_forward
        self._qkv = Projection(eager, *PROJECTIONS[:3], inference=inference)
        self._o = Projection(eager, PROJECTIONS[3], inference=inference)

    @classmethod
    def claims(cls, module: Any) -> bool:
        known = (*PROJECTIONS, "head_dim", "num_key_value_groups", "scaling", "layer_idx", "config")
        return holds(module, *known)

    @classmethod
    def objection(cls, module: Any) -> str | None:
        more = [name for name, _ in module.named_children() if name not in PROJECTIONS]
        if more:
            return f"it holds {', '.join(more)} beside its projections"
        if _name_of(module) not in FAMILY:
            return f"{_name_of(module)} is not known to compute what LlamaAttention does"
        more = sorted(set(signature(type(module).forward).parameters) - cls.ARGUMENTS)
        if more:
            return f"its forward takes {', '.join(more)}, which is unknown here"
        return None

    @classmethod
    def trial(cls, module: Any, draw: Callable[..., Tensor]) -> None:
        return None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, S, C) to (B, S, C) and, from "eager" attention, the probabilities (B, H, S, T)."""
        if position_embeddings is None or position_embeddings[0].shape[-1] != self.head_dim:
            return self.eager.forward(
                hidden_states, position_embeddings, attention_mask, past_key_values,
                cache_position=cache_position, **kwargs,
            )  # fmt: skip
        cos, sin = position_embeddings
        q, k, v = self._project(hidden_states)
        wide = torch.promote_types(q.dtype, cos.dtype)  # they differ under autocast
        half_cos, half_sin, positions = self.angles.get(cos, lambda: _angles(cos, sin), self)
        angles = half_cos.to(wide), half_sin.to(wide), positions
        more = []  # for the caches of transformers 4
        if cache_position is not None:
            more = [{"cos": cos, "sin": sin, "cache_position": cache_position}]
        q, k = q.to(wide), k.to(wide)
        q, k, v = rotate(q, k, v, angles, past_key_values, self.layer_idx, *more)
        output, probabilities = self._attend(q, k, v, attention_mask, kwargs)
        return self._o(output.flatten(2)), probabilities

    def _project(self, hidden_states: Tensor) -> Three:
        """q (B, H, S, D), k and v (B, H / groups, S, D), views of one product."""
        heads = self._qkv(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        count = heads.shape[1] // (self.num_key_value_groups + 2)
        q, k, v = heads.split((heads.shape[1] - 2 * count, count, count), 1)
        return q, k, v

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The output (B, S, H, D), and the probabilities where the attention function has them."""
        function = self.config._attn_implementation
        dropout = self.attention_dropout if self.training else 0.0
        is_plain = mask is None and not dropout and all(name in UNREAD for name in kwargs)
        if function == "sdpa" and is_plain and q.dtype == k.dtype == v.dtype:
            output = self._operator(q, k, v)
            if output is not None:
                return output, None
        by_name = function not in ("eager", None)
        attention = ALL_ATTENTION_FUNCTIONS[function] if by_name else self._eager_function
        beside = FAMILY[self._family](self)
        return attention(
            self, q, k, v, mask, dropout=dropout, scaling=self.scaling, **beside, **kwargs
        )

    def _operator(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        """What "sdpa" computes without a mask, or None where the operator has no advantage."""
        batch, heads, queries, dim = q.shape
        if head_dim_objection(dim):
            return None
        if queries == 1 and k.shape[1] == heads and not torch.is_grad_enabled():
            return kernels.decode_attention(q, k, v, scale=self.scaling).transpose(1, 2)
        if queries == 1:  # the heads that share keys are the rows of one: no copies of these
            packed = q.reshape(batch, k.shape[1], self.num_key_value_groups, dim)
            output = kernels.cross_attention(packed, k, v, scale=self.scaling)
            return output.reshape(batch, 1, heads, dim)
        if k.shape[1] != heads or (self.is_causal and k.shape[2] != queries):
            return None
        kind = "causal" if self.is_causal else "full"
        return kernels.attention(q, k, v, kind, scale=self.scaling).transpose(1, 2)


class FusedPublishedAttention(FusedModule):
    """In place of LlamaAttention as the published QLLaMA, and LLaMA code of its time, has it.

    With an additive mask, its own rotary tables, and a pair of tensors for a cache.
    """

    def __init__(self, eager: Any, inference: bool) -> None:
        super().__init__(eager, inference)
        self._qkv = Projection(eager, *PROJECTIONS[:3], inference=inference)
        self._o = Projection(eager, PROJECTIONS[3], inference=inference)

    @classmethod
    def claims(cls, module: Any) -> bool:
        named = type(module).__name__ == "LlamaAttention"
        held = holds(module, *PROJECTIONS, "rotary_emb", "head_dim")
        return named and held and same_arguments(cls, type(module))

    @classmethod
    def objection(cls, module: Any) -> str | None:
        if not type(module.rotary_emb).__name__.endswith("LlamaRotaryEmbedding"):
            return f"its rotary embedding is {type(module.rotary_emb).__name__}"
        if getattr(module, "num_key_value_groups", 1) != 1:
            return "its keys have fewer heads than its queries"
        return head_dim_objection(module.head_dim)

    @classmethod
    def trial(cls, module: Any, draw: Callable[..., Tensor]) -> tuple:
        return draw(2, 17, module.q_proj.in_features), None, torch.arange(17).expand(2, 17)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_value: tuple[Tensor, Tensor] | None = None,
        output_attentions: bool = False,
        use_cache: bool = False,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        """As the eager module, which runs where probabilities are asked for: (B, S, C) to the same,
        None, and the keys and values (B, H, T, D) of all positions where use_cache."""
        if output_attentions or position_ids is None:
            return self.eager.forward(
                hidden_states, attention_mask, position_ids, past_key_value, output_attentions,
                use_cache,
            )  # fmt: skip
        heads = self._qkv(hidden_states).unflatten(-1, (3, -1, self.head_dim)).transpose(1, 3)
        q, k, v = heads.unbind(2)
        past = 0 if past_key_value is None else past_key_value[0].shape[2]
        tables = self.rotary_emb(v, seq_len=past + k.shape[2])  # (1, 1, P, D), the halves alike
        cos, sin = (table.flatten(0, -2)[:, : self.head_dim // 2] for table in tables)
        q, k = kernels.rotary(q, k, cos, sin, position_ids)
        if past_key_value is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(past_key_value, (k, v), strict=True))
        elif use_cache:
            v = v.contiguous()  # a view would keep q and k in memory for as long
        output = self._o(attend(q, k, v, attention_mask).transpose(1, 2).flatten(2))
        return output, None, (k, v) if use_cache else None


class FusedLlamaMLP(FusedModule):
    """In place of any LLaMA's MLP: down(silu(gate(x)) * up(x)), gate and up as one product."""

    def __init__(self, eager: Any, inference: bool) -> None:
        super().__init__(eager, inference)
        self._gate_up = Projection(eager, "gate_proj", "up_proj", inference=inference)
        self._down = Projection(eager, "down_proj", inference=inference)

    @classmethod
    def claims(cls, module: Any) -> bool:
        return holds(module, "gate_proj", "up_proj", "down_proj", "act_fn")

    @classmethod
    def objection(cls, module: Any) -> str | None:
        if type(module.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
            return f"its activation is {type(module.act_fn).__name__}, not SiLU"
        return None

    @classmethod
    def trial(cls, module: Any, draw: Callable[..., Tensor]) -> tuple:
        return (draw(2, 17, module.gate_proj.in_features),)

    def forward(self, x: Tensor) -> Tensor:
        if self.stays_eager:
            return self.eager.forward(x)
        return self._down(self._gate_up(x, "swiglu"))


def _name_of(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _angles(cos: Tensor, sin: Tensor) -> Three:
    """transformers' cos and sin (B or 1, S, D) as the rotary operator takes them.

    One row a token, (P, D / 2), and its number: positions (B or 1, S).
    """
    rows, tokens, dim = cos.shape
    positions = torch.arange(rows * tokens, device=cos.device).view(rows, tokens)
    cos, sin = (x[..., : dim // 2].reshape(rows * tokens, -1) for x in (cos, sin))
    return cos, sin, positions  # the second half of a head's angles is the first again
