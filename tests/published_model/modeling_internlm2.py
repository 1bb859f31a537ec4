"""InternLM2 named, shaped and called as the published remote code's, written from its description.

One linear for queries, keys and values, grouped by key head; additive masks; pairs of tensors for a
cache; rotary tables in every attention, of which the dynamic ones grow with the longest call.
"""

import math
from types import SimpleNamespace

import torch
from torch import nn


class InternLM2RMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        wide = hidden_states.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden_states.dtype)


class InternLM2RotaryEmbedding(nn.Module):
    def __init__(self, dim, max_position_embeddings=2048, base=10000, scaling_factor=1.0):
        super().__init__()
        self.dim, self.base = dim, base
        self.max_position_embeddings, self.scaling_factor = max_position_embeddings, scaling_factor
        self._build(max_position_embeddings)

    def base_of(self, length):
        return self.base

    def _build(self, length):
        inv_freq = 1.0 / self.base_of(length) ** (torch.arange(0, self.dim, 2).float() / self.dim)
        angles = torch.outer(torch.arange(length).float(), inv_freq).repeat(1, 2)
        self.max_seq_len_cached = length
        self.register_buffer("cos_cached", angles.cos(), persistent=False)
        self.register_buffer("sin_cached", angles.sin(), persistent=False)

    def forward(self, x, seq_len=None):
        if seq_len > self.max_seq_len_cached:
            self._build(seq_len)
        return tuple(table[:seq_len].to(x.dtype) for table in (self.cos_cached, self.sin_cached))


class InternLM2DynamicNTKScalingRotaryEmbedding(InternLM2RotaryEmbedding):
    def base_of(self, length):
        if length <= self.max_position_embeddings:
            return self.base
        growth = self.scaling_factor * length / self.max_position_embeddings
        return self.base * (growth - self.scaling_factor + 1) ** (self.dim / (self.dim - 2))


def rotate_half(x):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(q, k, cos, sin, position_ids):
    cos, sin = cos[position_ids].unsqueeze(1), sin[position_ids].unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class InternLM2MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.w1, self.w3 = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.w2, self.act_fn = nn.Linear(inner, width, bias=False), nn.SiLU()

    def forward(self, x):
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


class InternLM2Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.hidden_size = config, config.hidden_size
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.key_heads
        self.head_dim = self.hidden_size // self.num_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        rows = (self.num_heads + 2 * self.num_key_value_heads) * self.head_dim
        self.wqkv = nn.Linear(self.hidden_size, rows, bias=config.bias)
        self.wo = nn.Linear(self.hidden_size, self.hidden_size, bias=config.bias)
        kinds = {
            None: InternLM2RotaryEmbedding,
            "dynamic": InternLM2DynamicNTKScalingRotaryEmbedding,
        }
        self.rotary_emb = kinds[config.scaling](self.head_dim, config.positions, 1000000, 2.0)

    def forward(
        self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None,
        output_attentions=False, use_cache=False, **kwargs,
    ):  # fmt: skip
        groups = self.num_key_value_groups
        heads = self.wqkv(hidden_states).unflatten(-1, (-1, groups + 2, self.head_dim))
        q = heads[..., :groups, :].flatten(2, 3).transpose(1, 2)
        k, v = heads[..., -2, :].transpose(1, 2), heads[..., -1, :].transpose(1, 2)
        length = k.shape[2] + (0 if past_key_value is None else past_key_value[0].shape[2])
        q, k = apply_rotary_pos_emb(q, k, *self.rotary_emb(v, seq_len=length), position_ids)
        if past_key_value is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(past_key_value, (k, v), strict=True))
        cached = (k, v) if use_cache else None
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        scores = q @ k.transpose(2, 3) / math.sqrt(self.head_dim)
        if attention_mask is not None:
            scores = scores + attention_mask
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        output = self.wo((weights @ v).transpose(1, 2).flatten(2))
        return output, weights if output_attentions else None, cached


class InternLM2DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention, self.feed_forward = InternLM2Attention(config), InternLM2MLP(config)
        self.attention_norm = InternLM2RMSNorm(config.hidden_size, config.eps)
        self.ffn_norm = InternLM2RMSNorm(config.hidden_size, config.eps)

    def forward(self, hidden_states, **options):
        output = self.attention(hidden_states=self.attention_norm(hidden_states), **options)
        hidden_states = hidden_states + output[0]
        hidden_states = hidden_states + self.feed_forward(self.ffn_norm(hidden_states))
        return (hidden_states, *output[1:])


class InternLM2ForCausalLM(nn.Module):
    """With the loop over the layers in it; returns logits, caches, and attentions where asked."""

    def __init__(self, **changes):
        super().__init__()
        self.config = config = SimpleNamespace(**{
            "hidden_size": 64, "num_attention_heads": 4, "key_heads": 2, "intermediate_size": 96,
            "bias": True, "scaling": None, "positions": 32, "eps": 1e-5,
        } | changes)  # fmt: skip
        self.tok_embeddings = nn.Embedding(61, config.hidden_size)
        self.layers = nn.ModuleList(InternLM2DecoderLayer(config) for _ in range(3))
        self.norm = InternLM2RMSNorm(config.hidden_size, config.eps)
        self.output = nn.Linear(config.hidden_size, 61, bias=False)

    def mask(self, real, queries, dtype):
        """Two masks of the lowest value, added up."""
        low, keys = torch.finfo(dtype).min, real.shape[1]
        hidden = torch.arange(keys) > torch.arange(keys - queries, keys)[:, None]
        causal = torch.zeros(queries, keys, dtype=dtype).masked_fill(hidden, low)
        padding = torch.zeros(real.shape, dtype=dtype).masked_fill(real == 0, low)
        return causal + padding[:, None, None]

    def forward(self, ids, attention_mask=None, past=None, output_attentions=False):
        length = ids.shape[1] + (0 if past is None else past[0][0].shape[2])
        real = torch.ones(len(ids), length) if attention_mask is None else attention_mask
        positions = (real.cumsum(-1).long() - 1).clamp(min=0)[:, -ids.shape[1] :]
        hidden_states = self.tok_embeddings(ids)
        mask, made, seen = self.mask(real, ids.shape[1], hidden_states.dtype), [], []
        for index, layer in enumerate(self.layers):
            hidden_states, weights, cached = layer(
                hidden_states, attention_mask=mask, position_ids=positions, use_cache=True,
                past_key_value=past and past[index], output_attentions=output_attentions,
            )  # fmt: skip
            made.append(cached)
            seen.append(weights)
        return self.output(self.norm(hidden_states)), tuple(made), seen
