"""The composite, named, shaped and called as the published remote code's, from its description.

Tower, pooler and QLLaMA, enough to see every kind of module.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .modeling_intern_vit import InternVisionModel
from .modeling_qllama import LlamaForCausalLM


class CrossAttention(nn.Module):
    def __init__(self, width, heads, out):
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.q_bias, self.k_bias, self.v_bias = (nn.Parameter(torch.randn(width)) for _ in range(3))
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.proj = nn.Linear(width, out)

    def forward(self, x, k, v):
        q, k, v = (
            F.linear(t, linear.weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for t, linear, bias in (
                (x, self.q, self.q_bias), (k, self.k, self.k_bias), (v, self.v, self.v_bias)
            )
        )  # fmt: skip
        x = (((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(x))


class AttentionPoolingBlock(nn.Module):
    def __init__(self, width, heads, out):
        super().__init__()
        self.norm1_q, self.norm1_k, self.norm1_v = (nn.LayerNorm(width) for _ in range(3))
        for norm in (self.norm1_q, self.norm1_k, self.norm1_v):
            nn.init.normal_(norm.weight, 1.0)
            nn.init.normal_(norm.bias)
        self.cross_attn = CrossAttention(width, heads, out)

    def forward(self, x):
        query = self.norm1_q(x.mean(1, keepdim=True))
        return self.cross_attn(query, self.norm1_k(x), self.norm1_v(x)).squeeze(1)


class InternVLModel(nn.Module):
    def __init__(self, qllama_config, width=48, heads=3, inner=96, layers=3, **kinds):
        super().__init__()
        self.vision_model = InternVisionModel(layers, width, heads, inner, **kinds)
        self.clip_projector = AttentionPoolingBlock(width, 4, 24)
        self.query_tokens = nn.Parameter(
            torch.randn(1, qllama_config.num_query_token, qllama_config.hidden_size)
        )
        self.qllama = LlamaForCausalLM(qllama_config)

    def forward(self, x, **inputs):
        image = self.vision_model(pixel_embeds=x).last_hidden_state
        queries = self.query_tokens.expand(len(x), -1, -1)
        text = self.qllama(
            inputs_embeds=queries,
            vision_hidden_states=image,
            use_zero_attention_mask=True,
            **inputs,
        )
        return self.clip_projector(image), text.logits
