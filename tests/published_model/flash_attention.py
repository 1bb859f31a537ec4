"""The published wrapper of flash-attn, from its description.

Like that it computes on a GPU only: a CPU shows whether it is recognised, and nothing else.
"""

import torch
import torch.nn.functional as F
from torch import nn


class FlashAttention(nn.Module):
    """The published wrapper of flash-attn: qkv (B, N, 3, H, D) to (B, N, H, D), and None."""

    def __init__(self, softmax_scale=None, attention_dropout=0.0, device=None, dtype=None):
        super().__init__()
        self.softmax_scale, self.dropout_p = softmax_scale, attention_dropout

    def forward(
        self,
        qkv,
        key_padding_mask=None,
        causal=False,
        cu_seqlens=None,
        max_s=None,
        need_weights=False,
    ):
        assert not need_weights
        assert qkv.dtype in [torch.float16, torch.bfloat16]
        assert qkv.is_cuda
        q, k, v = qkv.transpose(1, 3).unbind(2)
        dropout = self.dropout_p if self.training else 0.0
        output = F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=causal, scale=self.softmax_scale
        )
        return output.transpose(1, 2), None
