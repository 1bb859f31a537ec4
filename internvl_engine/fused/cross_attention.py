"""QLLaMA's cross-attention on the fused operators: queries (B, Q, C) read an image (B, N, C_v).

    q = norm1(h) Wq        k, v = norm2(x) Wkv        one product; x / rms(x) once for all layers
    cross_attention(q, k, v) Wo

Each layer applies its own norm weight to the shared x / rms(x), which gives the very bits of its
own RMSNorm; folding the weights into K and V would save that product but lose the published bits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..modeling.qllama_layers import split_heads
from .attention import head_dim_objection
from .base import FusedModule, holds, same_arguments
from .norm import is_rms_norm, normalize
from .projection import Projection
from .sharing import Shared


class FusedCrossAttention(FusedModule):
    """In place of the published LlamaCrossAttention, which norms both its inputs."""

    PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
    NORMS = ("norm1", "norm2")

    def __init__(self, eager: Any, inference: bool) -> None:
        super().__init__(eager, inference)
        self._cross = CrossAttention(eager, inference)

    @classmethod
    def claims(cls, module: Any) -> bool:
        named = type(module).__name__ == "LlamaCrossAttention"
        held = holds(module, *cls.PROJECTIONS, *cls.NORMS)
        return named and held and same_arguments(cls, type(module))

    @classmethod
    def objection(cls, module: Any) -> str | None:
        if not all(is_rms_norm(getattr(module, name)) for name in cls.NORMS):
            return "its norms are not RMSNorm"
        return head_dim_objection(module.head_dim)

    @classmethod
    def trial(cls, module: Any, draw: Callable[..., Tensor]) -> tuple:
        widths = (getattr(module, name).weight.shape[0] for name in cls.NORMS)
        return tuple(draw(2, 17, width) for width in widths)

    def projections(self) -> list[Projection]:
        return self._cross.projections()

    def share_image(self, image: Shared) -> None:
        """Takes part in normalising the image states once for all layers."""
        self._cross.image = image

    def forward(
        self,
        hidden_states: Tensor,
        vision_hidden_states: Tensor,
        repeat_time: int = 1,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_value: tuple[Tensor, Tensor] | None = None,
        output_attentions: bool = False,
        use_cache: bool = False,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        """The eager module's (output, None, its keys and values where use_cache).

        That one computes what no operator does: probabilities, a mask, the keys of a cache before
        the image's.
        """
        fits = repeat_time * vision_hidden_states.shape[0] == hidden_states.shape[0]
        is_plain = attention_mask is None and past_key_value is None and not output_attentions
        if not (fits and is_plain) or self.is_watched:
            return self.eager.forward(
                hidden_states, vision_hidden_states, repeat_time, attention_mask, position_ids,
                past_key_value, output_attentions, use_cache,
            )  # fmt: skip
        k, v = self._cross.read(vision_hidden_states)
        output = self._cross.attend(normalize(self.norm1, hidden_states), k, v)
        if use_cache and repeat_time > 1:
            k, v = (x.repeat(repeat_time, 1, 1, 1) for x in (k, v))
        return output, None, (k, v) if use_cache else None


class CrossAttention:
    """The cross-attention of a fused module: what LlamaCrossAttention does after its norm1."""

    def __init__(self, eager: Any, inference: bool) -> None:
        self.norm1, self.norm2 = eager.norm1, eager.norm2
        self.num_heads = eager.num_heads
        self.image: Shared | None = None
        self._q = Projection(eager, "q_proj", inference=inference)
        self._kv = Projection(eager, "k_proj", "v_proj", inference=inference)
        self._o = Projection(eager, "o_proj", inference=inference)

    def projections(self) -> list[Projection]:
        return [self._q, self._kv, self._o]

    def __call__(self, normed: Tensor, image: Tensor) -> Tensor:
        """What the queries normed (r * B, Q, C) read of image (B, N, C_v): (r * B, Q, C)."""
        return self.attend(normed, *self.read(image))

    def read(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, N, D)."""
        k, v = self._kv(self._normalized(image)).chunk(2, dim=-1)
        return split_heads(k, self.num_heads), split_heads(v, self.num_heads)

    def attend(self, normed: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output for the queries, row i reading image i % B."""
        q = split_heads(self._q(normed), self.num_heads)
        return self._o(kernels.cross_attention(q, k, v).transpose(1, 2).flatten(2))

    def _normalized(self, image: Tensor) -> Tensor:
        norm = self.norm2
        if self.image is None or torch.is_grad_enabled() or norm.weight.dtype != image.dtype:
            return normalize(norm, image)

        def divided() -> Tensor:
            return kernels.rms_norm(image, image.new_ones(image.shape[-1]), norm.variance_epsilon)

        return self.image.get(image, divided, self) * norm.weight
