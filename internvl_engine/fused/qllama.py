"""Our QLLaMA on the fused operators: a layer, and the loop over the layers.

q, k, v = n Wqkv                         one product; n comes with h from the layer before
q, k = rotary(q, k)                      with the cache's write, where it is a KVCache
n, h = add_rms_norm(attention Wo, h)     residual and the next norm in one pass
cross-attention                          its first norm likewise, where all positions cross
n, h = add_rms_norm(swiglu(n Wgu) Wd, h)

B batch, S positions, C width
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .. import kernels
from ..modeling.masks import AttentionMask
from ..modeling.qllama import (
    LlamaAttention,
    LlamaCrossAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
)
from ..weights import is_hooked
from . import decode_step
from .attention import Angles, Heads, attend, rotate
from .base import FusedModule, contract, is_for_onnx
from .cross_attention import attend_image, read_image
from .mlp import is_silu
from .norm import add_normalize, normalize
from .vision import carries

Tables = tuple[Tensor, Tensor]


class FusedCausalLM(FusedModule):
    """Our LlamaForCausalLM, whose head is packed: reading it is a good part of a decoding step."""

    LINEARS = {"head": ("lm_head",)}

    @classmethod
    def matches(cls, module: Any) -> bool:
        return isinstance(module, LlamaForCausalLM)

    forward = LlamaForCausalLM.forward  # whose product is `_head`

    def _head(self, states: Tensor) -> Tensor:
        if "head" not in self._fusion.linears or is_for_onnx():
            return self.lm_head(states)
        return self.product("head")(states)


class FusedDecoder(FusedModule):
    """The loop of our LlamaModel, where nobody looks in between."""

    COMPUTED = ("norm",)

    @classmethod
    def matches(cls, module: Any) -> bool:
        return isinstance(module, LlamaModel)

    @property
    def stays_eager(self) -> bool:
        parts = self.parts()
        watched = any(map(is_hooked, parts)) or self._fusion.contract != contract(self, parts)
        return watched or torch.is_grad_enabled() or not all(map(carries, self.layers))

    forward = LlamaModel.forward  # whose loop is `_decode`

    def _decode(
        self,
        hidden: Tensor,
        mask: Tensor | AttentionMask,
        position_ids: Tensor | None,
        cache: Cache | None,
        vision: Tensor | None,
        repeat_time: int,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
        recompute: bool = False,
    ) -> BaseModelOutputWithPast:
        """As LlamaModel._decode, which runs under gradients and where states are asked for."""
        asks = self._asked(output_attentions, "output_attentions")
        asks = asks or self._asked(output_hidden_states, "output_hidden_states")
        if asks or self.stays_eager:
            return super()._decode(  # type: ignore[misc]
                hidden, mask, position_ids, cache, vision, repeat_time, output_attentions,
                output_hidden_states, recompute,
            )  # fmt: skip
        past = cache.get_seq_length() if cache is not None else 0
        bounded = getattr(cache, "is_static", False)
        positions, tables = self.rotary_emb.at(position_ids, past, hidden, bounded)
        if decode_step.takes(self, hidden, cache, vision):
            states = decode_step.step(self, hidden, mask, positions, tables, cache)
            return BaseModelOutputWithPast(last_hidden_state=states)
        norms = [*(layer.input_layernorm for layer in self.layers), self.norm]
        normed = normalize(norms[0], hidden)
        for layer, norm in zip(self.layers, norms[1:], strict=True):
            normed, hidden = layer.run(
                "step", normed, hidden, mask, positions, cache, vision, tables, norm
            )
        return BaseModelOutputWithPast(last_hidden_state=normed)


class FusedDecoderLayer(FusedModule):
    """Our LlamaDecoderLayer, with or without cross-attention: (B, S, C) to (B, S, C)."""

    COMPILED = "step"
    LINEARS = {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "o": ("self_attn.o_proj",),
        "cross_q": ("cross_attn.q_proj",),
        "cross_kv": ("cross_attn.k_proj", "cross_attn.v_proj"),
        "cross_o": ("cross_attn.o_proj",),
        "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    }
    COMPUTED = ("input_layernorm", "post_attention_layernorm", "self_attn", "mlp", "mlp.act_fn",
                "cross_attn", "cross_attn.norm1", "cross_attn.norm2")  # fmt: skip

    @classmethod
    def matches(cls, module: Any) -> bool:
        return isinstance(module, LlamaDecoderLayer)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        if not isinstance(module.self_attn, LlamaAttention):
            return "its attention was replaced"
        if not is_silu(module.mlp.act_fn):
            return f"its activation is {type(module.mlp.act_fn).__name__}, not SiLU"
        return kernels.unsupported_head_dim(module.self_attn.head_dim)

    @classmethod
    def example_inputs(cls, module: Any, draw: Callable[..., Tensor]) -> tuple:
        hidden, cross = draw(2, 17, module.hidden_size), module.cross_attn
        reads = isinstance(cross, LlamaCrossAttention)
        image = draw(2, 17, cross.vision_hidden_size) if reads else None
        positions, tables = module.self_attn.rotary_emb.at(None, 0, hidden)
        return hidden, None, positions, None, False, image, 1, tables

    def compute(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | AttentionMask | None = None,
        position_ids: Any = None,
        past_key_value: Cache | None = None,
        output_attentions: bool = False,
        vision_hidden_states: Any = None,
        repeat_time: int = 1,
        position_embeddings: Any = None,
    ) -> Any:
        """As LlamaDecoderLayer.forward, without probabilities."""
        if output_attentions or position_embeddings is None:
            return NotImplemented
        normed = normalize(self.input_layernorm, hidden_states)
        hidden = self.run(
            "step", normed, hidden_states, attention_mask, position_ids, past_key_value,
            vision_hidden_states, position_embeddings, None,
        )[1]  # fmt: skip
        return hidden, None

    def step(
        self,
        normed: Tensor,
        hidden: Tensor,
        mask: Tensor | AttentionMask | None,
        positions: Any,
        cache: Cache | None,
        image: Any,
        tables: Tables,
        next_norm: nn.Module | None,
    ) -> tuple[Any, Tensor]:
        """The layer as values: (n, h) of this layer to those of the next one.

        Args:
            normed: (B, S, C), the first norm of hidden.
            hidden: (B, S, C).
            mask, positions, cache, image, tables: as `forward`.
            next_norm: of what follows; None where nothing does.

        Returns:
            (next_norm(h) or None, h), each (B, S, C).
        """
        past = cache.get_seq_length(self.layer_idx) if cache is not None else 0
        queries = min(self.num_query_token - past, hidden.shape[1])
        crosses = self.cross_attn is not None and image is not None and queries > 0
        all_cross = crosses and queries == hidden.shape[1]
        norm = self.cross_attn.norm1 if all_cross else self.post_attention_layernorm
        attended = self._self_attend(normed, mask, Angles(*tables, positions), cache)
        normed, hidden = add_normalize(attended, hidden, None, norm)
        if crosses:
            normed, hidden = self._cross_attend(normed, hidden, queries, image)
        update = self.product("down")(self.product("gate_up")(normed, "swiglu"))
        if next_norm is None:
            return None, hidden + update
        return add_normalize(update, hidden, None, next_norm)

    def _self_attend(self, normed: Tensor, mask: Any, angles: Angles, cache: Any) -> Tensor:
        qkv = self.product("qkv")(normed).unflatten(-1, (3, self.self_attn.num_heads, -1))
        heads = Heads(*qkv.permute(2, 0, 3, 1, 4).unbind())  # few views: a decoding step is short
        heads = rotate(heads, angles, cache, self.layer_idx)
        return self.product("o")(attend(heads, mask).transpose(1, 2).flatten(2))

    def _cross_attend(
        self, normed: Tensor, hidden: Tensor, queries: int, image: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(post_attention_layernorm(h), h) after the first `queries` positions read the image.

        normed is the cross-attention's own norm of hidden where all positions do.
        """
        cross, norm = self.cross_attn, self.post_attention_layernorm
        q, o = self.product("cross_q"), self.product("cross_o")
        k, v = read_image(self.product("cross_kv"), cross.norm2, image, cross.num_heads)
        if queries == hidden.shape[1]:
            return add_normalize(attend_image(q, o, normed, k, v), hidden, None, norm)
        states = hidden[:, :queries]
        states = states + attend_image(q, o, normalize(cross.norm1, states), k, v)
        hidden = torch.cat((states, hidden[:, queries:]), dim=1)
        return normalize(norm, hidden), hidden
