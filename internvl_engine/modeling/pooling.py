"""The attention poolers: a sequence of tokens to one embedding, in plain PyTorch.

    y = proj(attention(q(LN(mean(x))), k(LN(x)), v(LN(x))))

The query is the mean of all tokens, class token included. No residual, no MLP, no final norm.
Source: OpenGVLab/InternVL, modeling_internvl.py (AttentionPoolingBlock).

    B batch, N tokens, C width (3200 for the vision tower, 4096 for the queries), E = 768 embedding
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CrossAttention(nn.Module):
    """Multi-head attention of queries to a second sequence, each with its own projection.

    Args:
        dim: width C of all inputs.
        num_heads: heads of dim / num_heads each, unless attn_head_dim says otherwise.
        qkv_bias: biases of q, k and v, kept apart from the weights as in the checkpoint.
        qk_scale: factor of q before the product; None is head size ** -0.5.
        attn_drop, proj_drop: dropout of the probabilities and of the output.
        attn_head_dim: size of a head where it is not dim / num_heads.
        out_dim: width of the output; None is dim.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        attn_head_dim: int | None = None,
        out_dim: int | None = None,
    ) -> None:
        super().__init__()
        head_dim = attn_head_dim or dim // num_heads
        width = head_dim * num_heads
        if attn_head_dim is None and width != dim:
            raise ValueError(
                f"CrossAttention: dim must be a multiple of num_heads, got {dim} and {num_heads}"
            )
        self.num_heads = num_heads
        self.scale = qk_scale or head_dim**-0.5
        self.q_bias: nn.Parameter | None
        self.k_bias: nn.Parameter | None
        self.v_bias: nn.Parameter | None
        self.q = nn.Linear(dim, width, bias=False)
        self.k = nn.Linear(dim, width, bias=False)
        self.v = nn.Linear(dim, width, bias=False)
        for name in ("q_bias", "k_bias", "v_bias"):
            bias = nn.Parameter(torch.zeros(width)) if qkv_bias else None
            self.register_parameter(name, bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(width, out_dim or dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def reset_extra_parameters(self, std: float) -> None:
        for bias in (self.q_bias, self.k_bias, self.v_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """x: (B, M, C) asks; k and v: (B, N, C) answer, x where None. Returns (B, M, out_dim)."""
        q, k, v = (
            _project(source, project, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for source, project, bias in (
                (x, self.q, self.q_bias),
                (x if k is None else k, self.k, self.k_bias),
                (x if v is None else v, self.v, self.v_bias),
            )
        )
        probabilities = self.attn_drop(((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1))
        output = (probabilities @ v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(output))


def _project(x: Tensor, linear: nn.Module, bias: Tensor | None) -> Tensor:
    """x through a Linear whose bias is a parameter of its own; whatever the Linear has become."""
    if type(linear) is nn.Linear:
        return F.linear(x, linear.weight, bias)
    return linear(x) if bias is None else linear(x) + bias


class AttentiveBlock(nn.Module):
    """Layer norms of query, key and value, each its own, then CrossAttention.

    Args: as CrossAttention's; norm_layer makes a norm from a width.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        norm_layer: type[nn.Module] = nn.LayerNorm,
        attn_head_dim: int | None = None,
        out_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1_q = norm_layer(dim)
        self.norm1_k = norm_layer(dim)
        self.norm1_v = norm_layer(dim)
        self.cross_attn = CrossAttention(
            dim, num_heads, qkv_bias, qk_scale, attn_drop, drop, attn_head_dim, out_dim
        )

    def forward(
        self, x_q: Tensor, x_kv: Tensor, pos_q: Tensor | float = 0, pos_k: Tensor | float = 0
    ) -> Tensor:
        """x_q: (B, M, C), x_kv: (B, N, C); positions are added to query and key before the
        norms."""
        return self.cross_attn(
            self.norm1_q(x_q + pos_q), self.norm1_k(x_kv + pos_k), self.norm1_v(x_kv)
        )


class AttentionPoolingBlock(AttentiveBlock):
    """Pools a sequence: its mean asks all its tokens. (B, N, C) to (B, out_dim)."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x.mean(1, keepdim=True), x).squeeze(1)
