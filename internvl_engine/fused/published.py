"""Self-attention of published remote code, which has its own rotary tables and pairs for a cache.

    q, k, v = x Wqkv                 one product
    q, k = rotary(q, k)              by the tables of the module
    attention(q, k, v) Wo            under an additive mask (B, 1, S, T)

B batch, S queries, T keys, C width, H and Hk heads, D head size
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from .attention import Heads, attend
from .base import FusedModule, holds

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
Pair = tuple[Tensor, Tensor]


class FusedPublishedAttention(FusedModule):
    """LlamaAttention as the published QLLaMA, and LLaMA code of its time, has it.

    With an additive mask, its own rotary tables, and a pair of tensors for a cache.
    """

    LINEARS = {"qkv": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",)}
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
        past_key_value: Pair | None = None,
        output_attentions: bool = False,
        use_cache: bool = False,
    ) -> Any:
        """(B, S, C) to the same, None, and the keys and values (B, Hk, T, D) of all positions where
        use_cache."""
        if output_attentions or position_ids is None:
            return NotImplemented
        return self._attend(hidden_states, attention_mask, position_ids, past_key_value, use_cache)

    def _attend(
        self, hidden: Tensor, mask: Tensor | None, positions: Tensor, past: Pair | None,
        use_cache: bool,
    ) -> tuple[Tensor, None, Pair | None]:  # fmt: skip
        q, k, v = self._split(self.product("qkv")(hidden))
        length = k.shape[2] + (0 if past is None else past[0].shape[2])
        tables = self.rotary_emb(v, seq_len=length)  # (1, 1, P, D) or (P, D), the halves alike
        cos, sin = (table.flatten(0, -2)[:, : self.head_dim // 2] for table in tables)
        q, k = kernels.rotary(q, k, cos, sin, positions)
        if past is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(past, (k, v), strict=True))
        elif use_cache:
            v = v.contiguous()  # a view would keep q and k in memory for as long
        attended = attend(Heads(q, k, v), mask).transpose(1, 2)
        output = self.product("o")(attended.flatten(2))
        return output, None, (k, v) if use_cache else None

    def _split(self, qkv: Tensor) -> Heads:
        """Views of one product, (B, H, S, D) each."""
        return Heads(*qkv.unflatten(-1, (3, -1, self.head_dim)).transpose(1, 3).unbind(2))


class FusedInternLM2Attention(FusedPublishedAttention):
    """InternLM2Attention: one linear has the queries, the key and the value of each key head."""

    LINEARS = {"qkv": ("wqkv",), "o": ("wo",)}

    @classmethod
    def matches(cls, module: Any) -> bool:
        return holds(module, "wqkv", "wo", "rotary_emb", "head_dim", "num_key_value_groups")

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        if not type(module.rotary_emb).__name__.endswith("RotaryEmbedding"):
            return f"its rotary embedding is {type(module.rotary_emb).__name__}"
        if getattr(module.config, "rope_pos_id_version", "default") == "v2pe":
            return "its positions are those of V2PE"
        return kernels.unsupported_head_dim(module.head_dim)

    @classmethod
    def example_inputs(cls, module: Any, draw: Callable[..., Tensor]) -> tuple:
        positions = torch.arange(17, dtype=torch.int64, device="cpu").expand(2, 17)
        return draw(2, 17, module.wqkv.in_features), None, positions

    def compute(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Any = None,
        past_key_value: Pair | None = None,
        output_attentions: bool = False,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> Any:
        if output_attentions or position_ids is None or kwargs:
            return NotImplemented
        if attention_mask is not None and attention_mask.dim() != 4:  # flash-attn's
            return NotImplemented
        return self._attend(hidden_states, attention_mask, position_ids, past_key_value, use_cache)

    def _split(self, qkv: Tensor) -> Heads:
        """q is a copy: its heads do not lie at one distance from each other."""
        groups = self.num_key_value_groups
        heads = qkv.unflatten(-1, (-1, groups + 2, self.head_dim))  # (B, S, Hk, G + 2, D)
        q, k, v = heads[..., :groups, :].flatten(2, 3), heads[..., -2, :], heads[..., -1, :]
        return Heads(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
