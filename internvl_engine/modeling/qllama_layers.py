"""The layers of QLLaMA in plain PyTorch.

    h = h + o(attention(rotary(q(n)), rotary(k(n)), v(n)))        n = input_layernorm(h)
    every second layer, first Q positions only, where there is an image x:
        h = h + o(attention(q(norm1(h)), k(norm2(x)), v(norm2(x))))
    h = h + down(silu(gate(m)) * up(m))                           m = post_attention_layernorm(h)

All linears are without bias; queries and text share every weight but the cross-attention's.
Source: OpenGVLab/InternVL, modeling_qllama.py.

    B batch, S positions, Q = 96 queries, T keys, N vision tokens, C = 4096 width, H = 32 heads of
    D = 128
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache

from .. import reference
from .masks import AttentionMask

ROTARY_BASE = 10000.0  # a constant of the published model: rope_theta in a config is ignored


def num_query_token(config: LlamaConfig) -> int:
    """Q of a config that may be a plain LlamaConfig."""
    return getattr(config, "num_query_token", 96)


class LlamaDecoderLayer(nn.Module):
    """Self-attention, on some layers cross-attention of the queries, MLP."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.hidden_size = config.hidden_size
        self.num_query_token = num_query_token(config)
        self.self_attn = LlamaAttention(config, layer_idx)
        crosses = layer_idx % getattr(config, "cross_attention_frequency", 2) == 0
        self.cross_attn = LlamaCrossAttention(config) if crosses else None
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | AttentionMask | None = None,
        position_ids: Tensor | None = None,
        past_key_value: Cache | None = None,
        output_attentions: bool = False,
        vision_hidden_states: Tensor | None = None,
        repeat_time: int = 1,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One layer: (B, S, C) to ((B, S, C), attention probabilities (B, H, S, T) or None).

        Args: as `LlamaModel.forward`; position_embeddings: the rotary tables (cos, sin), (P, D /
            2).
        """
        past = past_key_value.get_seq_length(self.layer_idx) if past_key_value is not None else 0
        attended, attention = self.self_attn(
            self.input_layernorm(hidden_states),
            attention_mask,
            position_ids,
            past_key_value,
            output_attentions,
            position_embeddings,
        )
        hidden = hidden_states + attended
        queries = min(self.num_query_token - past, hidden.shape[1])
        if self.cross_attn is not None and vision_hidden_states is not None and queries > 0:
            states = hidden[:, :queries]
            states = states + self.cross_attn(states, vision_hidden_states, repeat_time)
            hidden = torch.cat((states, hidden[:, queries:]), dim=1)
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), attention


class LlamaAttention(nn.Module):
    """Multi-head self-attention with rotary positions and a cache."""

    def __init__(self, config: LlamaConfig, layer_idx: int = 0) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = self.hidden_size // self.num_heads
        if self.head_dim * self.num_heads != self.hidden_size:
            raise ValueError(
                "LlamaAttention: hidden_size must be a multiple of num_attention_heads, "
                f"got {self.hidden_size} and {self.num_heads}"
            )
        self.q_proj = nn.Linear(self.hidden_size, self.hidden_size, bias=False)
        self.k_proj = nn.Linear(self.hidden_size, self.hidden_size, bias=False)
        self.v_proj = nn.Linear(self.hidden_size, self.hidden_size, bias=False)
        self.o_proj = nn.Linear(self.hidden_size, self.hidden_size, bias=False)
        self.rotary_emb = LlamaRotaryEmbedding(self.head_dim, config.max_position_embeddings)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | AttentionMask | None = None,
        position_ids: Any = None,
        past_key_value: Cache | None = None,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, S, C) to ((B, S, C), probabilities (B, H, S, T) where asked for)."""
        q, k, v = (
            split_heads(project(hidden_states), self.num_heads)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if position_embeddings is None:
            past = (
                past_key_value.get_seq_length(self.layer_idx) if past_key_value is not None else 0
            )
            position_ids, position_embeddings = self.rotary_emb.at(
                position_ids, past, hidden_states
            )
        q, k = reference.rotary(q, k, *position_embeddings, position_ids)
        if past_key_value is not None:
            k, v = past_key_value.update(k, v, self.layer_idx)
        if isinstance(attention_mask, AttentionMask):
            attention_mask = attention_mask.additive(q.dtype, q.device)
        output, probabilities = reference.masked_attention(q, k, v, attention_mask)
        output = self.o_proj(output.transpose(1, 2).flatten(2))
        return output, probabilities if output_attentions else None


class LlamaCrossAttention(nn.Module):
    """The queries read the image: pre-norms of both sides, no rotary, no mask, no gate."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = self.hidden_size // self.num_heads
        self.vision_hidden_size = getattr(config, "vision_hidden_size", 3200)
        self.norm1 = LlamaRMSNorm(self.hidden_size, eps=config.rms_norm_eps)
        self.norm2 = LlamaRMSNorm(self.vision_hidden_size, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(self.hidden_size, self.hidden_size, bias=False)
        self.k_proj = nn.Linear(self.vision_hidden_size, self.hidden_size, bias=False)
        self.v_proj = nn.Linear(self.vision_hidden_size, self.hidden_size, bias=False)
        self.o_proj = nn.Linear(self.hidden_size, self.hidden_size, bias=False)

    def forward(
        self, hidden_states: Tensor, vision_hidden_states: Tensor, repeat_time: int = 1
    ) -> Tensor:
        """What the queries read, before the residual add.

        Args:
            hidden_states: (r * B, Q, C). vision_hidden_states: (B, N, C_v). repeat_time: r; row i
                of the queries reads image i % B.

        Returns:
            (r * B, Q, C).

        Raises:
            ValueError: the batches do not fit.
        """
        if hidden_states.shape[0] != repeat_time * vision_hidden_states.shape[0]:
            raise ValueError(
                f"LlamaCrossAttention: {repeat_time} x {vision_hidden_states.shape[0]} images must "
                f"make the {hidden_states.shape[0]} rows of the queries"
            )
        q = split_heads(self.q_proj(self.norm1(hidden_states)), self.num_heads)
        image = self.norm2(vision_hidden_states)
        k = split_heads(self.k_proj(image), self.num_heads)
        v = split_heads(self.v_proj(image), self.num_heads)
        output = reference.cross_attention(q, k, v)
        return self.o_proj(output.transpose(1, 2).flatten(2))


class LlamaMLP(nn.Module):
    """down(silu(gate(x)) * up(x)): (B, S, C) to (B, S, C)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LlamaRMSNorm(nn.Module):
    """RMSNorm, rounded to the dtype of the *weight* before the weight is applied.

    The same as InternRMSNorm wherever weight and input share a dtype.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype == self.weight.dtype:
            return reference.rms_norm(hidden_states, self.weight, self.variance_epsilon)
        wide = reference.widen(hidden_states)
        mean_square = wide.square().mean(-1, keepdim=True)
        normed = wide * torch.rsqrt(mean_square + self.variance_epsilon)
        return self.weight * normed.to(self.weight.dtype)


class LlamaRotaryEmbedding(nn.Module):
    """The tables of cos and sin, computed in float32 when first needed and grown on demand.

    They are no buffers: a model built on the meta device has none to lose.
    """

    def __init__(
        self, dim: int, max_position_embeddings: int = 2048, base: float = ROTARY_BASE
    ) -> None:
        super().__init__()
        self.dim = dim
        self.max_position_embeddings = max_position_embeddings
        self.base = base
        self._tables: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (1, 1, seq_len, dim), both halves alike, in the dtype of x."""
        cos, sin = (table[:seq_len] for table in self.table(seq_len, x.dtype, x.device))
        return torch.cat((cos, cos), -1)[None, None], torch.cat((sin, sin), -1)[None, None]

    def table(self, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (at least length, dim / 2)."""
        tables = self._tables.get((dtype, device))
        if tables is None or tables[0].shape[0] < length:
            rows = max(self.max_position_embeddings, 1 << (length - 1).bit_length())
            with torch.inference_mode(False):  # else a later training step could not save them
                tables = reference.rotary_table(rows, self.dim, self.base, dtype, device)
            self._tables[dtype, device] = tables
        return tables

    def at(
        self, position_ids: Tensor | None, past: int, hidden: Tensor, bounded: bool = False
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(position_ids, tables) for hidden (B, S, C) after `past` cached positions.

        Args:
            position_ids: (B, S), or None to count on from the cache.
            bounded: whether they are known to lie below past + S, so that nobody has to look.
        """
        end = past + hidden.shape[1]
        if position_ids is None:
            position_ids = torch.arange(past, end, dtype=torch.int64, device=hidden.device)[None]
        elif not bounded and position_ids.device.type == "cpu":  # on a GPU it stops the stream
            end = max(end, int(position_ids.max()) + 1 if position_ids.numel() else 0)
        return position_ids, self.table(end, hidden.dtype, hidden.device)


class FixedLlamaRotaryEmbedding(LlamaRotaryEmbedding):
    """The published code's second name for it; there it repairs a buffer that ours does not
    have."""


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, S, H * D) to (B, H, S, D), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
