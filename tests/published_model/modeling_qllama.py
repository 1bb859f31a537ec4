"""QLLaMA named, shaped and called as the published remote code's, written from its description.

Additive masks, pairs of tensors for a cache, a rotary table in every attention. Sizes that are
literals there (96 queries, 3200 of the image) come from the configuration, so that it can be small,
and so does `norm_class`: what stands for LlamaRMSNorm (apex.py).
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN


@dataclass
class Output:
    last_hidden_state: torch.Tensor
    past_key_values: tuple | None
    attentions: tuple | None
    hidden_states: tuple | None
    logits: torch.Tensor | None = None


class LlamaRMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(self.weight.dtype)


def norm_of(config, width=None):
    cls = getattr(config, "norm_class", LlamaRMSNorm)
    return cls(width or config.hidden_size, eps=config.rms_norm_eps)


class LlamaRotaryEmbedding(nn.Module):
    """A table that grows on demand; nothing of it is in the state dict."""

    def __init__(self, dim, max_position_embeddings=2048, base=10000):
        super().__init__()
        self.dim, self.base = dim, base
        self._build(max_position_embeddings)

    def _build(self, length):
        inv_freq = 1.0 / self.base ** (torch.arange(0, self.dim, 2).float() / self.dim)
        angles = torch.outer(torch.arange(length).float(), inv_freq).repeat(1, 2)[None, None]
        self.max_seq_len_cached = length
        self.register_buffer("cos_cached", angles.cos(), persistent=False)
        self.register_buffer("sin_cached", angles.sin(), persistent=False)

    def forward(self, x, seq_len):
        if seq_len > self.max_seq_len_cached:
            self._build(seq_len)
        tables = (self.cos_cached, self.sin_cached)
        return tuple(table[:, :, :seq_len].to(x.dtype) for table in tables)


class FixedLlamaRotaryEmbedding(LlamaRotaryEmbedding):
    pass


def rotate_half(x):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_pos_emb(q, k, cos, sin, position_ids):
    cos, sin = (table[0, 0][position_ids].unsqueeze(1) for table in (cos, sin))
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def attend(q, k, v, attention_mask):
    weights = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if attention_mask is not None:
        if attention_mask.shape != (len(q), 1, *weights.shape[2:]):
            raise ValueError(f"Attention mask should be of size {weights.shape}")
        lowest = torch.tensor(torch.finfo(weights.dtype).min)
        weights = torch.max(weights + attention_mask, lowest)
    weights = weights.softmax(-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2).flatten(2), weights


class LlamaMLP(nn.Module):
    def __init__(self, hidden_size, intermediate_size, hidden_act):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.act_fn = ACT2FN[hidden_act]

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LlamaAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        width = self.hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = width // self.num_heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.rotary_emb = FixedLlamaRotaryEmbedding(self.head_dim, config.max_position_embeddings)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_ids=None,
        past_key_value=None,
        output_attentions=False,
        use_cache=False,
    ):
        q, k, v = (
            project(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        length = k.shape[-2] + (past_key_value[0].shape[-2] if past_key_value is not None else 0)
        cos, sin = self.rotary_emb(v, seq_len=length)
        q, k = apply_rotary_pos_emb(q, k, cos, sin, position_ids)
        if past_key_value is not None:
            k = torch.cat((past_key_value[0], k), dim=2)
            v = torch.cat((past_key_value[1], v), dim=2)
        output, weights = attend(q, k, v, attention_mask)
        past_key_value = (k, v) if use_cache else None
        return self.o_proj(output), weights if output_attentions else None, past_key_value


class LlamaCrossAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        width = self.hidden_size = config.hidden_size
        vision = self.vision_hidden_size = config.vision_hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = width // self.num_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.norm1 = norm_of(config)
        self.k_proj = nn.Linear(vision, width, bias=False)
        self.v_proj = nn.Linear(vision, width, bias=False)
        self.norm2 = norm_of(config, vision)

    def forward(
        self,
        hidden_states,
        vision_hidden_states,
        repeat_time=1,
        attention_mask=None,
        past_key_value=None,
        output_attentions=False,
        use_cache=False,
    ):
        image = self.norm2(vision_hidden_states)
        q, k, v = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x in (
                self.q_proj(self.norm1(hidden_states)),
                self.k_proj(image),
                self.v_proj(image),
            )
        )
        k, v = (x.repeat(repeat_time, 1, 1, 1) for x in (k, v))
        if past_key_value is not None:  # published so: keys of the text before the image's
            k = torch.cat((past_key_value[0], k), dim=2)
            v = torch.cat((past_key_value[1], v), dim=2)
        output, weights = attend(q, k, v, attention_mask)
        past_key_value = (k, v) if use_cache else None
        return self.o_proj(output), weights if output_attentions else None, past_key_value


class LlamaDecoderLayer(nn.Module):
    def __init__(self, config, use_cross_attn):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.num_query_token = config.num_query_token
        self.self_attn = LlamaAttention(config)
        self.cross_attn = LlamaCrossAttention(config) if use_cross_attn else None
        self.mlp = LlamaMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.input_layernorm, self.post_attention_layernorm = norm_of(config), norm_of(config)

    def forward(
        self,
        hidden_states,
        vision_hidden_states,
        attention_mask=None,
        position_ids=None,
        past_key_value=None,
        output_attentions=False,
        use_cache=False,
        repeat_time=1,
    ):
        attended, weights, present = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_value=past_key_value,
            output_attentions=output_attentions,
            use_cache=use_cache,
        )
        hidden_states = hidden_states + attended
        queries = self.num_query_token
        reads = self.cross_attn is not None and vision_hidden_states is not None
        if reads and hidden_states.shape[1] >= queries:
            read, _, _ = self.cross_attn(
                hidden_states=hidden_states[:, :queries],
                vision_hidden_states=vision_hidden_states,
                attention_mask=None,
                past_key_value=past_key_value,
                output_attentions=output_attentions,
                use_cache=use_cache,
                repeat_time=repeat_time,
            )
            read = hidden_states[:, :queries] + read
            hidden_states = torch.cat((read, hidden_states[:, queries:]), dim=1)
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        outputs = (hidden_states,)
        if output_attentions:
            outputs += (weights,)
        return outputs + ((present,) if use_cache else ())


class LlamaModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_query_token = config.num_query_token
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(config, index % config.cross_attention_frequency == 0)
            for index in range(config.num_hidden_layers)
        )
        self.norm = norm_of(config)
        self.gradient_checkpointing = False

    def mask(self, seen, queries, dtype, use_zero_attention_mask):
        """Padding (B, T) and causality, summed; then the block of the query tokens opened."""
        lowest, total = torch.finfo(dtype).min, seen.shape[1]
        padding = torch.zeros(seen.shape, dtype=dtype).masked_fill(seen == 0, lowest)
        causal = torch.full((queries, total), lowest, dtype=dtype).triu(1 + total - queries)
        mask = padding[:, None, None, :] + causal
        if use_zero_attention_mask:
            mask[:, :, : self.num_query_token, : self.num_query_token] = 0
        return mask

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        vision_hidden_states=None,
        repeat_time=1,
        use_cache=False,
        output_attentions=False,
        output_hidden_states=False,
        use_zero_attention_mask=False,
    ):
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, tokens = hidden.shape[:2]
        past = past_key_values[0][0].shape[2] if past_key_values is not None else 0
        if attention_mask is None:
            attention_mask = torch.ones(batch, past + tokens)
        is_prefill = use_zero_attention_mask and past == 0
        return self.forward_train(
            attention_mask=self.mask(attention_mask, tokens, hidden.dtype, is_prefill),
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=hidden,
            vision_hidden_states=vision_hidden_states,
            repeat_time=repeat_time,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )

    def forward_train(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        vision_hidden_states=None,
        repeat_time=1,
        use_cache=False,
        output_attentions=False,
        output_hidden_states=False,
    ):
        """The loop, with the mask (B, 1, S, T) as it is given; may recompute its layers."""
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past = past_key_values[0][0].shape[2] if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + hidden.shape[1])[None]
        options = {"output_attentions": output_attentions, "use_cache": use_cache}
        presents, attentions, states = (), (), ()
        for index, layer in enumerate(self.layers):
            states += (hidden,)
            inputs = (hidden, vision_hidden_states, attention_mask, position_ids)
            if self.gradient_checkpointing and self.training:
                layer = partial(checkpoint, layer, use_reentrant=False)
                outputs = layer(*inputs, None, output_attentions, None, repeat_time)
            else:
                outputs = layer(
                    hidden,
                    vision_hidden_states,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    past_key_value=past_key_values[index] if past_key_values is not None else None,
                    repeat_time=repeat_time,
                    **options,
                )
            hidden = outputs[0]
            presents += outputs[-1:]
            attentions += outputs[1:2]
        hidden = self.norm(hidden)
        return Output(
            last_hidden_state=hidden,
            past_key_values=presents if use_cache else None,
            attentions=attentions if output_attentions else None,
            hidden_states=(*states, hidden) if output_hidden_states else None,
        )


class LlamaForCausalLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, **inputs):
        output = self.model(**inputs)
        output.logits = self.lm_head(output.last_hidden_state)
        return output
