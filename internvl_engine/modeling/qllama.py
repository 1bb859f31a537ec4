"""QLLaMA-8B in plain PyTorch: LLaMA-7B whose learned queries read the image by cross-attention.

Source: OpenGVLab/InternVL, modeling_qllama.py; SPEC of the layer: qllama_layers.py. A plain
transformers.LlamaConfig with `num_query_token`, `cross_attention_frequency` and
`vision_hidden_size` configures it (96, 2 and 3200 where absent).

    B batch, Q = 96 queries, S positions of this call, T positions with the cache, C = 4096 width,
    V vocabulary, N vision tokens, C_v = 3200 vision width
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationMixin, LlamaConfig
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .base import InternVLPreTrainedModel
from .masks import AttentionMask, _expand_mask, _make_causal_mask, count_positions
from .qllama_layers import (
    FixedLlamaRotaryEmbedding,
    LlamaAttention,
    LlamaCrossAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    num_query_token,
)

__all__ = [
    "FixedLlamaRotaryEmbedding",
    "LlamaAttention",
    "LlamaCrossAttention",
    "LlamaDecoderLayer",
    "LlamaForCausalLM",
    "LlamaMLP",
    "LlamaModel",
    "LlamaPreTrainedModel",
    "LlamaRMSNorm",
    "LlamaRotaryEmbedding",
    "_expand_mask",
    "_make_causal_mask",
]

LegacyCache = list[tuple[Tensor, Tensor]] | tuple[tuple[Tensor, Tensor], ...]


class LlamaPreTrainedModel(InternVLPreTrainedModel):
    """Base of the decoder's two classes; a plain LlamaConfig configures it."""

    config_class = LlamaConfig
    base_model_prefix = "model"
    _no_split_modules = ["LlamaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]


class LlamaForCausalLM(LlamaPreTrainedModel, GenerationMixin):
    """QLLaMA with its LM head; generates through transformers' GenerationMixin."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.lm_head = new_embeddings

    def get_decoder(self) -> "LlamaModel":
        return self.model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | AttentionMask | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | LegacyCache | None = None,
        inputs_embeds: Tensor | None = None,
        vision_hidden_states: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        use_zero_attention_mask: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        repeat_time: int = 1,
    ) -> tuple | CausalLMOutputWithPast:
        """As `LlamaModel.forward`, then the LM head.

        Args:
            labels: (B, S), the ids themselves; position t predicts label t + 1 and -100 is ignored.
            logits_to_keep: only the logits of the last so many positions; 0 is all.

        Returns:
            logits (B, S, V) in the dtype of the weights, loss where labels came, past_key_values.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_hidden_states=vision_hidden_states,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            use_zero_attention_mask=use_zero_attention_mask,
            return_dict=True,
            repeat_time=repeat_time,
        )
        logits = self._head(outputs.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            if labels.shape != logits.shape[:2]:
                raise ValueError(
                    f"LlamaForCausalLM: labels must be {tuple(logits.shape[:2])} as the logits "
                    f"are, got {tuple(labels.shape)}"
                )
            loss = F.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().to(logits.device)
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return output.to_tuple() if return_dict is False else output

    def _head(self, states: Tensor) -> Tensor:
        """(B, S, C) to logits (B, S, V)."""
        return self.lm_head(states)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        vision_hidden_states: Tensor | None = None,
        use_zero_attention_mask: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The next call's inputs: what the cache lacks of inputs_embeds, then one id a step.

        Positions count real tokens (`cumsum(mask) - 1`, 1 where padded) as the published code's.
        Cross-attention needs the image only until the cache holds the queries.
        """
        if past_key_values is None:  # what transformers 5.24 calls it
            past_key_values = cache
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        prompt = 0 if inputs_embeds is None else inputs_embeds.shape[1]
        inputs: dict[str, Any]
        if inputs_embeds is not None and past < prompt:
            inputs = {"inputs_embeds": inputs_embeds[:, past:]}
            new = prompt - past
        else:
            new = 1 if past else input_ids.shape[1]
            inputs = {"input_ids": input_ids[:, -new:]}
        if attention_mask is None:  # transformers 5 drops a mask of ones
            positions = torch.arange(past, past + new, dtype=torch.int64, device=input_ids.device)[
                None
            ]
        else:
            positions = count_positions(attention_mask)[:, -new:]
        if past < num_query_token(self.config):
            inputs["vision_hidden_states"] = vision_hidden_states
        return inputs | {
            "position_ids": positions,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": kwargs.get("use_cache"),
            "use_zero_attention_mask": use_zero_attention_mask,
            "output_attentions": kwargs.get("output_attentions"),
            "output_hidden_states": kwargs.get("output_hidden_states"),
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
        }


class LlamaModel(LlamaPreTrainedModel):
    """The decoder without a head: ids or embeddings to states after the final norm."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.num_query_token = num_query_token(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            LlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(
            config.hidden_size // config.num_attention_heads, config.max_position_embeddings
        )
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | AttentionMask | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | LegacyCache | None = None,
        inputs_embeds: Tensor | None = None,
        vision_hidden_states: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        use_zero_attention_mask: bool | None = None,
        return_dict: bool | None = None,
        repeat_time: int = 1,
    ) -> tuple | BaseModelOutputWithPast:
        """Decodes [queries | text], causal and padded.

        Args:
            input_ids: (B, S), or inputs_embeds: (B, S, C).
            attention_mask: (B, T) of 1 for tokens and 0 for padding; None is all ones. Or a ready
                additive mask (B, 1, S, T).
            position_ids: (B, S); None counts from the length of the cache, whatever the padding.
            past_key_values: transformers Cache, or the old list of (k, v), which comes back as
                such.
            vision_hidden_states: (B / repeat_time, N, C_v), read by the queries: those of the
                first Q positions of the sequence that are in this call.
            use_cache: return the cache; not while layers are recomputed in training.
            use_zero_attention_mask: let the first Q positions see each other (generation, image
                features).
            repeat_time: how often the images are tiled along the batch.

        Returns:
            last_hidden_state (B, S, C), past_key_values, hidden_states and attentions where asked
            for.

        Raises:
            ValueError: inputs are missing, doubled, or do not fit together.
        """
        if use_cache is None:
            use_cache = self.config.use_cache
        recompute = self._recomputes() and past_key_values is None
        use_cache = use_cache and not recompute  # a layer that runs twice would append twice
        embeds = self._embed(input_ids, inputs_embeds)
        cache, legacy = _as_cache(past_key_values, use_cache)
        past = cache.get_seq_length() if cache is not None else 0
        kind = "prefix" if use_zero_attention_mask else "causal"
        mask = self._mask(attention_mask, kind, embeds.shape[1], past)
        output = self._decode(
            embeds, mask, position_ids, cache, vision_hidden_states, repeat_time,
            output_attentions, output_hidden_states, recompute,
        )  # fmt: skip
        output.past_key_values = cache if use_cache else None
        if legacy is not None and cache is not None and use_cache:
            output.past_key_values = legacy((layer.keys, layer.values) for layer in cache.layers)
        return output.to_tuple() if return_dict is False else output

    def forward_train(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | AttentionMask | None = None,
        position_ids: Tensor | None = None,
        past_key_values: None = None,
        inputs_embeds: Tensor | None = None,
        vision_hidden_states: Tensor | None = None,
        repeat_time: int = 1,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> tuple | BaseModelOutputWithPast:
        """Encodes whole sequences without a cache, recomputing layers in training where switched
        on.

        Args: as `forward`, but attention_mask says everything: an additive mask (B, 1, S, S), an
            `AttentionMask`, or (B, S) where only padding is hidden and every position sees every
            other.

        Raises:
            ValueError: inputs are missing or doubled, or a cache came.
        """
        if past_key_values is not None or use_cache:
            raise ValueError("LlamaModel.forward_train keeps no cache; call forward for one")
        embeds = self._embed(input_ids, inputs_embeds)
        mask = self._mask(attention_mask, "full", embeds.shape[1], 0)
        output = self._decode(
            embeds, mask, position_ids, None, vision_hidden_states, repeat_time,
            output_attentions, output_hidden_states, self._recomputes(),
        )  # fmt: skip
        return output.to_tuple() if return_dict is False else output

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
        """The loop over the layers, and the final norm."""
        output_attentions = self._asked(output_attentions, "output_attentions")
        output_hidden_states = self._asked(output_hidden_states, "output_hidden_states")
        past = cache.get_seq_length() if cache is not None else 0
        bounded = getattr(cache, "is_static", False)
        positions, rotary = self.rotary_emb.at(position_ids, past, hidden, bounded)
        states, attentions = [hidden], []
        for layer in self.layers:
            arguments = (
                hidden, mask, positions, cache, output_attentions, vision, repeat_time, rotary,
            )  # fmt: skip
            if recompute:
                run = getattr(self, "_gradient_checkpointing_func", None) or _recompute
                hidden, attention = run(layer, *arguments)
            else:
                hidden, attention = layer(*arguments)
            states.append(hidden)
            attentions.append(attention)
            if not output_hidden_states:
                states.clear()
        hidden = self.norm(hidden)
        if output_hidden_states:
            states[-1] = hidden
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _recomputes(self) -> bool:
        """Whether layers run again in the backward pass instead of keeping their states."""
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    def _asked(self, value: bool | None, name: str) -> bool:
        return bool(getattr(self.config, name, False) if value is None else value)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("LlamaModel: give either input_ids or inputs_embeds")
        return self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

    def _mask(
        self, mask: Tensor | AttentionMask | None, kind: str, queries: int, past: int
    ) -> Tensor | AttentionMask:
        if isinstance(mask, AttentionMask) or (mask is not None and mask.ndim == 4):
            return mask
        keys = past + queries
        if mask is not None and (mask.ndim != 2 or mask.shape[1] != keys):
            raise ValueError(
                f"LlamaModel: attention_mask must be (batch, {keys}) for {past} cached and "
                f"{queries} new positions, or (batch, 1, {queries}, {keys}); "
                f"got {tuple(mask.shape)}"
            )
        return AttentionMask(kind, queries, keys, self.num_query_token, mask)


def _recompute(layer: nn.Module, *arguments: Any) -> Any:
    return checkpoint(layer, *arguments, use_reentrant=False)


def _as_cache(
    past: Cache | LegacyCache | None, use_cache: bool
) -> tuple[Cache | None, type[list] | type[tuple] | None]:
    """past as a transformers Cache, and list or tuple where it came as one."""
    if past is None:
        return (DynamicCache(), None) if use_cache else (None, None)
    if not isinstance(past, list | tuple):
        return past, None
    cache = DynamicCache()
    for index, (k, v) in enumerate(past):
        cache.update(k, v, index)
    return cache, list if isinstance(past, list) else tuple
