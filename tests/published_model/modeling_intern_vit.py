"""InternViT named, shaped and called as the published remote code's, from its description.

`norm` and `flash` make of it what it is where apex and flash-attn are installed.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

from .flash_attention import FlashAttention


class InternRMSNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.variance_epsilon = eps

    def forward(self, x):
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(x.dtype)


class InternAttention(nn.Module):
    def __init__(self, width, heads, norm=InternRMSNorm, flash=False):
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = width, heads, width // heads
        self.use_flash_attn = flash
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.qk_normalization = norm is not nn.LayerNorm  # as in the towers of 6B and 300M
        if self.qk_normalization:
            self.q_norm, self.k_norm = norm(width, eps=1e-6), norm(width, eps=1e-6)
        if flash:
            self.inner_attn = FlashAttention(attention_dropout=0.0)
        self.proj = nn.Linear(width, width)

    def _naive_attn(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.qk_normalization:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.view(batch, tokens, self.num_heads, -1).transpose(1, 2) for t in (q, k, v))
        attention = self.attn_drop(((q * self.scale) @ k.transpose(-2, -1)).softmax(-1))
        x = (attention @ v).transpose(1, 2).reshape(batch, tokens, width)
        return self.proj_drop(self.proj(x))

    def _flash_attn(self, x, key_padding_mask=None, need_weights=False):
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        qkv = torch.stack([self.q_norm(q), self.k_norm(k), v], dim=2)
        context, _ = self.inner_attn(
            qkv.unflatten(-1, (self.num_heads, -1)),
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            causal=False,
        )
        return self.proj_drop(self.proj(context.flatten(2)))

    def forward(self, hidden_states):
        if self.use_flash_attn:
            return self._flash_attn(hidden_states)
        return self._naive_attn(hidden_states)


class InternMLP(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.act = ACT2FN["gelu"]
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, hidden_states):
        return self.fc2(self.act(self.fc1(hidden_states)))


class InternVisionEncoderLayer(nn.Module):
    def __init__(self, width, heads, inner, norm=InternRMSNorm, flash=False):
        super().__init__()
        self.embed_dim, self.intermediate_size = width, inner
        self.attn, self.mlp = InternAttention(width, heads, norm, flash), InternMLP(width, inner)
        self.norm1, self.norm2 = norm(width, eps=1e-6), norm(width, eps=1e-6)
        self.ls1 = nn.Parameter(torch.rand(width))
        self.ls2 = nn.Parameter(torch.rand(width))
        self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()

    def forward(self, hidden_states):
        hidden = hidden_states
        hidden = hidden + self.drop_path1(self.attn(self.norm1(hidden)) * self.ls1)
        return hidden + self.drop_path2(self.mlp(self.norm2(hidden)) * self.ls2)


class InternVisionEncoder(nn.Module):
    def __init__(self, layers, *sizes, **kinds):
        super().__init__()
        self.config = PretrainedConfig()
        self.layers = nn.ModuleList(
            InternVisionEncoderLayer(*sizes, **kinds) for _ in range(layers)
        )
        self.gradient_checkpointing = True

    def forward(self, inputs_embeds, output_hidden_states=None, return_dict=None):
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states, hidden = (), inputs_embeds
        for layer in self.layers:
            states += (hidden,)
            if self.gradient_checkpointing and self.training:
                hidden = checkpoint(layer, hidden, use_reentrant=False)
            else:
                hidden = layer(hidden)
        states = (*states, hidden) if output_hidden_states else None
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=states)


class InternVisionModel(nn.Module):
    """The tower after its embeddings, which are a convolution like any other."""

    def __init__(self, *sizes, **kinds):
        super().__init__()
        self.encoder = InternVisionEncoder(*sizes, **kinds)

    def forward(
        self, pixel_values=None, output_hidden_states=None, return_dict=None, pixel_embeds=None
    ):
        outputs = self.encoder(
            inputs_embeds=pixel_embeds,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=outputs.last_hidden_state[:, 0],
            hidden_states=outputs.hidden_states,
        )
