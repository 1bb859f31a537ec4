"""An attention pooler that projects its one query instead of every token.

    score_j = (Wk_h^T q_h * wk) . n_j        n = LayerNorm(x) without weight and bias
    out_h = Wv_h (wv * sum_j p_j n_j + bv) + v_bias_h

The key's biases add the same to every score and cancel in the softmax. About 110 times fewer
operations for K and V than projecting 257 tokens. What it replaces: modeling/pooling.py.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..weights import is_plain_linear
from .base import FusedModule, holds

NORMS = ("norm1_q", "norm1_k", "norm1_v")
PROJECTIONS = tuple(f"cross_attn.{name}" for name in "qkv")


class FusedAttentionPooling(FusedModule):
    """AttentionPoolingBlock, ours or the published one: (B, N, C) to (B, E).

    Under gradients the eager block runs: the key's biases, which cancel here, would get no gradient
    at all where eager gives them zeros, and a distributed optimizer waits for every one.
    """

    COMPUTED = (*NORMS, "cross_attn", *PROJECTIONS)

    @classmethod
    def matches(cls, module: Any) -> bool:
        attention = getattr(module, "cross_attn", None)
        return (
            holds(module, *NORMS, "cross_attn")
            and all(isinstance(getattr(attention, name, None), nn.Linear) for name in "qkv")
            and "Pooling" in type(module).__name__
        )

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        norms = [getattr(module, name) for name in NORMS]
        if not all(isinstance(norm, nn.LayerNorm) and norm.elementwise_affine for norm in norms):
            return "its norms are not LayerNorm with weight and bias"
        if module.norm1_k.eps != module.norm1_v.eps:
            return "the norms of key and value have different epsilons"
        return None

    @classmethod
    def example_inputs(cls, module: Any, draw: Callable[..., Tensor]) -> tuple:
        return (draw(2, 17, module.norm1_k.weight.shape[0]),)

    def compute(self, x: Tensor) -> Tensor:
        attention = self.cross_attn
        is_plain = all(map(is_plain_linear, (attention.q, attention.k, attention.v)))
        if self.training or torch.is_grad_enabled() or not is_plain:
            return NotImplemented
        if len(x) > 1 and kernels.is_batch_invariant():  # einsum is not
            return torch.cat([self.compute(image) for image in x.split(1)])
        heads = attention.num_heads
        asked = self.norm1_q(x.mean(1))
        q = F.linear(asked, attention.q.weight, attention.q_bias).unflatten(-1, (heads, -1))
        keys = attention.k.weight.unflatten(0, (heads, -1))  # (H, D, C)
        query = torch.einsum("bhd,hdc->bhc", q * attention.scale, keys) * self.norm1_k.weight
        pooled = kernels.pooling_attention(query, x, self.norm1_k.eps)
        pooled = torch.addcmul(self.norm1_v.bias, pooled, self.norm1_v.weight)
        values = attention.v.weight.unflatten(0, (heads, -1))
        output = torch.einsum("bhc,hdc->bhd", pooled, values).flatten(1)
        if attention.v_bias is not None:
            output = output + attention.v_bias
        return attention.proj(output)
