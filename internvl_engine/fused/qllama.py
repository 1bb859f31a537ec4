"""The layers of QLLaMA on the fused operators.

    q, k, v = n Wqkv                         one product; n comes from the layer before
    q, k = rotary(q, k)                      with the cache's write, where it is a KVCache
    n, h = add_rms_norm(attention Wo, h)     residual and the next norm in one pass
    cross-attention                          image states normalised once for all layers
    n', h = add_rms_norm(swiglu(n Wgu) Wd, h)

What is merged, packed or handed on: projection.py and sharing.py.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..modeling.masks import AttentionMask
from ..modeling.qllama import LlamaAttention, LlamaCrossAttention, LlamaDecoderLayer
from ..modeling.qllama_layers import split_heads
from .attention import attend, head_dim_objection, rotate
from .base import FusedModule
from .cross_attention import CrossAttention
from .llama import FusedLlamaMLP
from .norm import add_normalize, normalize
from .projection import Projection, state_of, version_of
from .sharing import Handoff, Shared, counted


class FusedDecoderLayer(FusedModule):
    """In place of our LlamaDecoderLayer, with or without cross-attention."""

    before: Handoff | None = None  # from the layer before, and to the layer after
    after: Handoff | None = None

    def __init__(self, eager: Any, inference: bool) -> None:
        super().__init__(eager, inference)
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self._qkv = Projection(eager, *names, inference=inference)
        self._o = Projection(eager, "self_attn.o_proj", inference=inference)
        self._gate_up = Projection(eager, "mlp.gate_proj", "mlp.up_proj", inference=inference)
        self._down = Projection(eager, "mlp.down_proj", inference=inference)
        cross = eager.cross_attn  # None, or absent where its part was not loaded
        loaded = isinstance(cross, LlamaCrossAttention)
        self._cross: Any = CrossAttention(cross, inference) if loaded else None
        self._says_absent = cross is not None and not loaded
        self.constants: Constants | None = None  # of the first layer of a model with query tokens

    @classmethod
    def claims(cls, module: Any) -> bool:
        return isinstance(module, LlamaDecoderLayer)

    @classmethod
    def objection(cls, module: Any) -> str | None:
        if not isinstance(module.self_attn, LlamaAttention):
            return "its attention was replaced"
        too_wide = head_dim_objection(module.self_attn.head_dim)
        return too_wide or FusedLlamaMLP.objection(module.mlp)

    @classmethod
    def trial(cls, module: Any, draw: Callable[..., Tensor]) -> tuple:
        hidden, cross = draw(2, 17, module.hidden_size), module.cross_attn
        reads = isinstance(cross, LlamaCrossAttention)
        image = draw(2, 17, cross.vision_hidden_size) if reads else None
        positions, tables = module.self_attn.rotary_emb.at(None, 0, hidden)
        return hidden, None, positions, None, False, image, 1, tables

    def projections(self) -> list[Projection]:
        own = super().projections()
        return own + (self._cross.projections() if self._cross is not None else [])

    def share_image(self, image: Shared) -> None:
        """Takes part in normalising the image states once for all layers."""
        if self._cross is not None:
            self._cross.image = image

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | AttentionMask | None = None,
        position_ids: Any = None,
        past_key_value: Cache | None = None,
        output_attentions: bool = False,
        vision_hidden_states: Any = None,
        repeat_time: int = 1,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As LlamaDecoderLayer.forward, which runs where probabilities are asked for."""
        absent = self._says_absent and vision_hidden_states is not None
        if absent or output_attentions or self.is_watched or position_embeddings is None:
            return self.eager.forward(
                hidden_states, attention_mask, position_ids, past_key_value, output_attentions,
                vision_hidden_states, repeat_time, position_embeddings,
            )  # fmt: skip
        past = past_key_value.get_seq_length(self.layer_idx) if past_key_value is not None else 0
        queries = min(self.num_query_token - past, hidden_states.shape[1])
        crosses = self._cross is not None and vision_hidden_states is not None and queries > 0
        norm = self.post_attention_layernorm
        if crosses and queries == hidden_states.shape[1]:
            norm = self._cross.norm1
        normed, hidden = self._self_attend_once(
            hidden_states, attention_mask, position_ids, past_key_value, position_embeddings, norm
        )
        if crosses:
            normed, hidden = self._cross_attend(normed, hidden, queries, vision_hidden_states)
        update = self._down(self._gate_up(normed, "swiglu"))
        if self.after is None or not self.after.is_open:
            return hidden + update, None
        normed, hidden = counted(add_normalize, update, hidden, None, self.after.norm)
        self.after.put(hidden, normed)
        return hidden, None

    def _self_attend_once(
        self,
        hidden: Tensor,
        mask: Tensor | AttentionMask | None,
        position_ids: Any,
        cache: Any,
        tables: tuple[Tensor, Tensor],
        norm: Any,
    ) -> tuple[Tensor, Tensor]:
        """As `_self_attend`; once and for all where hidden is the model's constant queries."""
        constants = self.constants
        if constants is not None and cache is None and constants.are(hidden, mask):
            weights = self._state_of_weights(norm)
            if weights is None:  # wrapped, and perhaps unwrapped with other weights later
                constants.forget()
            else:
                return constants.get(
                    hidden.shape[0],
                    weights,
                    lambda one: self._self_attend(one, None, position_ids[:1], None, tables, norm),
                )
        return self._self_attend(hidden, mask, position_ids, cache, tables, norm)

    def _state_of_weights(self, norm: Any) -> tuple | None:
        """What changes when a weight of the self-attention does; None where nobody can tell."""
        linears = [*self._qkv.linears(), *self._o.linears()]
        norms = [version_of(each.weight) for each in (self.input_layernorm, norm)]
        states = (*map(state_of, linears), *norms)
        return None if None in states else states

    def _self_attend(
        self,
        hidden: Tensor,
        mask: Tensor | AttentionMask | None,
        position_ids: Any,
        cache: Any,
        tables: tuple[Tensor, Tensor],
        norm: Any,
    ) -> tuple[Tensor, Tensor]:
        """(norm(h), h) of h = hidden + self-attention."""
        normed = None if self.before is None else self.before.take(hidden)
        if normed is None:
            normed = normalize(self.input_layernorm, hidden)
        heads = self.self_attn.num_heads
        q, k, v = (split_heads(x, heads) for x in self._qkv(normed).chunk(3, dim=-1))
        q, k, v = rotate(q, k, v, (*tables, position_ids), cache, self.layer_idx)
        output = self._o(attend(q, k, v, mask).transpose(1, 2).flatten(2))
        return add_normalize(output, hidden, None, norm)

    def _cross_attend(
        self, normed: Tensor, hidden: Tensor, queries: int, image: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(post_attention_layernorm(h), h) after the first `queries` positions read the image."""
        norm = self.post_attention_layernorm
        if queries == hidden.shape[1]:  # normed is the cross-attention's own
            return add_normalize(self._cross(normed, image), hidden, None, norm)
        states = hidden[:, :queries]
        states = states + self._cross(normalize(self._cross.norm1, states), image)
        hidden = torch.cat((states, hidden[:, queries:]), dim=1)
        return normalize(norm, hidden), hidden


class Constants:
    """The first layer's self-attention over the query tokens, which no image has reached yet."""

    def __init__(self, owner: Any, name: str = "query_tokens") -> None:
        self.owner = owner
        self.name = name
        self._known: tuple[tuple, tuple[Tensor, Tensor]] | None = None

    def are(self, hidden: Tensor, mask: Tensor | AttentionMask | None) -> bool:
        """Whether hidden is nothing but the query tokens, for any number of images."""
        tokens = getattr(self.owner, self.name)
        is_open = mask is None or (isinstance(mask, AttentionMask) and mask.is_open)
        return (
            is_open
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled(hidden.device.type)  # which rounds otherwise
            and hidden.data_ptr() == tokens.data_ptr()
            and hidden.shape[1:] == tokens.shape[1:]
            and (hidden.stride(0) == 0 or hidden.shape[0] == 1)
        )

    def forget(self) -> None:
        """Drops what was computed."""
        self._known = None

    def get(
        self, batch: int, weights: tuple, compute: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """What compute makes of the tokens, for every image; anew when they or weights change."""
        tokens = getattr(self.owner, self.name)
        key = (version_of(tokens), weights)
        known = self._known
        if known is None or known[0] != key:
            known = self._known = key, counted(compute, tokens.detach())
        normed, hidden = (x.expand(batch, -1, -1) for x in known[1])
        return normed, hidden

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}
