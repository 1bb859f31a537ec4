"""QLLaMA's cross-attention on the fused operators: queries (B, Q, C) read an image (B, N, C_v).

q = norm1(h) Wq        k, v = norm2(x) Wkv, one product        cross_attention(q, k, v) Wo
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import kernels
from ..modeling.qllama_layers import split_heads
from .base import FusedModule, holds
from .norm import is_rms_norm, normalize

Product = Callable[..., Tensor]  # of linears with the same input
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS = ("norm1", "norm2")


def read_image(kv: Product, norm: nn.Module, image: Tensor, num_heads: int) -> list[Tensor]:
    """Keys and values (B, H, N, D) of an image (B, N, C_v), of which norm is the pre-norm."""
    return [split_heads(x, num_heads) for x in kv(normalize(norm, image)).chunk(2, dim=-1)]


def attend_image(q: Product, o: Product, normed: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What normed queries (r * B, Q, C) read, row i of image i % B: (r * B, Q, C)."""
    heads = split_heads(q(normed), k.shape[1])
    return o(kernels.cross_attention(heads, k, v).transpose(1, 2).flatten(2))


class FusedCrossAttention(FusedModule):
    """The published LlamaCrossAttention, which norms both its inputs."""

    LINEARS = {"q": PROJECTIONS[:1], "kv": PROJECTIONS[1:3], "o": PROJECTIONS[3:]}
    COMPUTED = NORMS

    @classmethod
    def matches(cls, module: Any) -> bool:
        named = type(module).__name__ == "LlamaCrossAttention"
        return named and holds(module, *PROJECTIONS, *NORMS)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        if not all(is_rms_norm(getattr(module, name)) for name in NORMS):
            return "its norms are not RMSNorm"
        return kernels.unsupported_head_dim(module.head_dim)

    @classmethod
    def example_inputs(cls, module: Any, draw: Callable[..., Tensor]) -> tuple:
        return tuple(draw(2, 17, getattr(module, name).weight.shape[0]) for name in NORMS)

    def compute(
        self,
        hidden_states: Tensor,
        vision_hidden_states: Tensor,
        repeat_time: int = 1,
        attention_mask: Tensor | None = None,
        past_key_value: tuple[Tensor, Tensor] | None = None,
        output_attentions: bool = False,
        use_cache: bool = False,
    ) -> Any:
        """The eager module's (output, None, its keys and values where use_cache).

        That one computes probabilities, a mask, and the keys of a cache before the image's.
        """
        fits = repeat_time * vision_hidden_states.shape[0] == hidden_states.shape[0]
        is_plain = attention_mask is None and past_key_value is None and not output_attentions
        if not (fits and is_plain):
            return NotImplemented
        k, v = read_image(self.product("kv"), self.norm2, vision_hidden_states, self.num_heads)
        normed = normalize(self.norm1, hidden_states)
        output = attend_image(self.product("q"), self.product("o"), normed, k, v)
        if use_cache and repeat_time > 1:
            k, v = (x.repeat(repeat_time, 1, 1, 1) for x in (k, v))
        return output, None, (k, v) if use_cache else None
