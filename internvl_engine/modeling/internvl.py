"""InternVL-14B: vision tower, QLLaMA with learned queries, poolers, heads.

    C embedding of an image   pooler1(vision)
    G embedding of an image   unit(pooler2(queries)) + unit(pooler1(vision))
    embedding of a text       last token of QLLaMA run as a plain LLaMA, times text_projection
    captions                  [queries | prompt] through QLLaMA with the image, then its LM head

Source: OpenGVLab/InternVL, modeling_internvl.py; Chen et al., InternVL, CVPR 2024.

    B images, N vision tokens of C_v = 3200, Q = 96 queries of C = 4096, L text tokens, E = 768
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.utils import ModelOutput
from transformers.utils.versions import require_version

from ..configuration import InternVLConfig
from .base import InternVLPreTrainedModel
from .lora import QLLAMA_LORA, VISION_LORA, wrap_lora
from .masks import AttentionMask
from .pooling import AttentionPoolingBlock
from .prompting import align_left, copies_asked, lengths_in_new_tokens, prompt_inputs
from .qllama import LlamaForCausalLM, LlamaModel
from .shared_prefix import Continued, Prefixes, read_prefixes, text_states
from .text_inputs import last_tokens
from .vision import InternVisionModel

__all__ = ["InternVLModel", "InternVLPreTrainedModel", "InternVL_C", "InternVL_G", "unit"]


@dataclass
class ImageFeatures(ModelOutput):
    """backbone_embeds (B, N, C_v), query_embeds (B, Q, C), and the towers' own outputs."""

    backbone_embeds: Tensor | None = None
    query_embeds: Tensor | None = None
    vision_outputs: BaseModelOutputWithPooling | None = None
    query_outputs: BaseModelOutputWithPast | None = None


@dataclass
class ContrastiveOutput(ModelOutput):
    """Logits (B, texts) and (texts, B), and the unit embeddings (B, E) and (texts, E)."""

    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None


class InternVLModel(InternVLPreTrainedModel):
    """The whole model; `mode` chooses "InternVL-C" or "InternVL-G" where the two differ."""

    config_class = InternVLConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["InternVisionEncoderLayer", "LlamaDecoderLayer", "AttentionPoolingBlock"]
    default_mode = "InternVL-C"

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__(config)
        width, embed_dim = config.hidden_size, config.clip_embed_dim
        self.vision_model = InternVisionModel(config.vision_config)
        self.qllama = LlamaForCausalLM(config.qllama_config)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_token, width))
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        heads = config.attn_pool_num_heads
        self.clip_projector = AttentionPoolingBlock(
            config.vision_config.hidden_size, heads, qkv_bias=True, out_dim=embed_dim
        )
        self.clip_projector2 = AttentionPoolingBlock(width, heads, qkv_bias=True, out_dim=embed_dim)
        self.itm_head = nn.Linear(width, 2)
        self.post_init()
        self.reset_extra_parameters(config.initializer_range)
        if config.force_image_size:
            vision = config.vision_config
            self.vision_model.resize_pos_embeddings(
                vision.image_size, config.force_image_size, vision.patch_size
            )
        if config.use_backbone_lora:
            self.wrap_backbone_lora(config.use_backbone_lora, config.backbone_lora_alpha)
        if config.use_qllama_lora:
            self.wrap_qllama_lora(config.use_qllama_lora, config.qllama_lora_alpha)

    def reset_extra_parameters(self, std: float) -> None:
        nn.init.zeros_(self.query_tokens)
        nn.init.normal_(self.text_projection, std=self.config.hidden_size**-0.5)
        nn.init.constant_(self.logit_scale, math.log(1 / 0.07))

    def forward(
        self,
        pixel_values: Tensor | None = None,
        text: Tensor | None = None,
        mode: str | None = None,
        *,
        image: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = True,
        return_dict: bool | None = None,
    ) -> Any:
        """Similarities of images and texts, or the features of images alone.

        Args:
            pixel_values: (B, 3, height, width); `image` is the published name for it.
            text: (texts, L) ids as `encode_text` takes; None asks for features.
            mode: "InternVL-C" or "InternVL-G"; only with text.
            input_ids: the name that processors and transformers have for `text`.
            attention_mask: (texts, L) of them.
            output_hidden_states: of the vision tower; only without text.
            return_dict: True returns a ContrastiveOutput or ImageFeatures; None does so where
                texts came as `input_ids`.

        Returns:
            With text (logits_per_image (B, texts), logits_per_text); without, (vision_outputs,
            query_outputs) whose first entries are (B, N, C_v) and (B, Q, C).
        """
        pixel_values = image if pixel_values is None else pixel_values
        if input_ids is not None:
            if text is not None:
                raise ValueError("InternVLModel: text and input_ids are two names for one argument")
            text, return_dict = input_ids, True if return_dict is None else return_dict
        if text is None:
            features = self._image_features(pixel_values, output_hidden_states)
            return features if return_dict else (features.vision_outputs, features.query_outputs)
        if pixel_values is None:
            raise ValueError("InternVLModel: texts came without pixel_values to compare with")
        image_embeds = unit(self.encode_image(pixel_values, mode or self.default_mode))
        text_embeds = unit(self.encode_text(text, attention_mask))
        logits = self.logit_scale.exp() * image_embeds @ text_embeds.t()
        output = ContrastiveOutput(logits, logits.t(), image_embeds, text_embeds)
        return output if return_dict else output.to_tuple()[:2]

    def encode_image(self, image: Tensor, mode: str | None = None) -> Tensor:
        """Embeds images; not normalised, and the G embedding has lengths from 0 to 2.

        Args:
            image: (B, 3, height, width), normalised; cast to the dtype of the weights.
            mode: "InternVL-C" or "InternVL-G".

        Returns:
            (B, E).

        Raises:
            NotImplementedError: mode is neither.
        """
        mode = mode or self.default_mode
        image = image.to(self.vision_model.dtype)
        if mode == "InternVL-C":
            return self.clip_projector(self.vision_model(pixel_values=image)[0])
        if mode == "InternVL-G":
            backbone_embeds, query_embeds = self.get_image_features(image)
            return self.g_embedding(self.clip_projector(backbone_embeds), query_embeds)
        raise NotImplementedError(f"mode must be 'InternVL-C' or 'InternVL-G', got {mode!r}")

    def g_embedding(self, image_embeds: Tensor, query_embeds: Tensor) -> Tensor:
        """The G embedding (B, E) of C embeddings (B, E) and the queries' states (B, Q, C)."""
        return unit(self.clip_projector2(query_embeds)) + unit(image_embeds)

    def encode_text(
        self,
        text: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        input_ids: Tensor | None = None,
        before: Continued | None = None,
    ) -> Tensor:
        """Embeds texts by the state of their last token; not normalised.

        Args:
            text: (B, L) ids of "summarize:" + text with BOS and EOS, padded on the right with 0.
                Ids that do not end so are warned of.
            attention_mask: (B, L), 1 for tokens; the last token is then the last 1, whatever the
                padding. None takes ids > 0 and, as published, their count for the place of the
                last.
            input_ids: the name that processors and transformers have for `text`.
            before: what the texts begin with, where `text` is the rest of them, one token at
                least; of `encode_prefixes`.

        Returns:
            (B, E).
        """
        ids = input_ids if text is None else text
        if ids is None or (text is not None and input_ids is not None):
            raise ValueError("encode_text: give ids, as text or as input_ids")
        eos = self.config.qllama_config.eos_token_id
        attention_mask, last = last_tokens(ids, attention_mask, eos)
        features: Any = self.get_text_features(ids, attention_mask, before=before)
        rows = torch.arange(features.shape[0], dtype=torch.int64, device=features.device)
        return features[rows, last.to(features.device)] @ self.text_projection

    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        before: Continued | None = None,
    ) -> Tensor | BaseModelOutputWithPast:
        """States (B, L, C) of QLLaMA run as a plain causal LLaMA over ids (B, L), after its last
        norm; the ids stand behind the prefixes `before`."""
        outputs = text_states(
            self._decoder, input_ids, attention_mask, before,
            output_attentions=output_attentions, output_hidden_states=output_hidden_states,
        )  # fmt: skip
        return outputs if return_dict else outputs.last_hidden_state

    def encode_prefixes(self, ids: Tensor, attention_mask: Tensor) -> Prefixes:
        """What texts begin with, run once for all of them: see `encode_text`.

        Args:
            ids: (G, P) of the beginnings, with BOS, padded on the right.
            attention_mask: (G, P), 1 for tokens.
        """
        return read_prefixes(self._decoder, ids, attention_mask)

    def get_image_features(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """(vision states (B, N, C_v), query states (B, Q, C)), or ImageFeatures."""
        features = self._image_features(pixel_values, output_hidden_states)
        return features if return_dict else features.to_tuple()[:2]

    def read_images(self, pixel_values: Tensor) -> tuple[ImageFeatures, Prefixes]:
        """Image features, and the keys and values of the queries, which captions go on from.

        In a caption too the queries see each other and no text, at the same positions: a cache that
        holds them spares `generate` the queries.

        Args:
            pixel_values: (B, 3, height, width), normalised.
        """
        kept = Prefixes(self.query_tokens.new_ones(len(pixel_values), self.query_tokens.shape[1]))
        return self._image_features(pixel_values, None, kept), kept

    def _image_features(
        self, pixel_values: Tensor | None, hidden_states: bool | None, kept: Prefixes | None = None
    ) -> ImageFeatures:
        vision: Any = self.vision_model(
            pixel_values=pixel_values, output_hidden_states=hidden_states, return_dict=True
        )
        states = vision.last_hidden_state
        queries = self.query_tokens.expand(states.shape[0], -1, -1)
        size = queries.shape[1]
        inputs: dict[str, Any] = {
            "inputs_embeds": queries,
            "vision_hidden_states": states,
            "attention_mask": AttentionMask("full", size, size),
        }
        outputs: Any
        if kept is None:
            outputs = self._decoder.forward_train(**inputs)
        else:
            outputs = self._decoder(**inputs, past_key_values=kept, use_cache=True)
        return ImageFeatures(states, outputs.last_hidden_state, vision, outputs)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        visual_features: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        align_prompts: bool = True,
        **generate_kwargs: Any,
    ) -> Any:
        """Continues prompts that follow the image's queries.

        Args:
            pixel_values: (B, 3, height, width), or visual_features: (B, N, C_v) of the vision
                tower.
            input_ids: (B, L) prompt ids without EOS; (1, L) serves every image.
            attention_mask: (B, L), 0 where a prompt is padded; None is all ones. Padding is moved
                to the left, where it must be, unless align_prompts is False (the published
                behaviour).
            generation_config, generate_kwargs: as transformers' `generate`. Without a length, 19
                new tokens. `max_length` and `min_length` count the BOS, not the prompt.

        Returns:
            (B, 1 + new tokens) ids as the published code gives them: one BOS, which was never fed
            to the model, then the new tokens without the prompt. Or transformers' output object.

        Raises:
            ValueError: no image, no prompt, or batches that do not fit.
            ImportError: transformers is older than 4.57.
        """
        require_version("transformers>=4.57", "InternVLModel.generate uses its caches")
        if (pixel_values is None) == (visual_features is None) or input_ids is None:
            raise ValueError("generate: give input_ids, and either pixel_values or visual_features")
        if visual_features is None:
            visual_features = self.vision_model(pixel_values=pixel_values)[0]
        batch = visual_features.shape[0]
        if input_ids.shape[0] not in (1, batch):
            raise ValueError(
                f"generate: input_ids must have 1 or {batch} rows for {batch} images, "
                f"got {input_ids.shape[0]}"
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if align_prompts:
            input_ids, mask = align_left(input_ids, mask)
        inputs = prompt_inputs(
            self.language_model,
            self.query_tokens,
            visual_features,
            input_ids,
            mask,
            generate_kwargs.pop("past_key_values", None),
            copies_asked(generation_config, generate_kwargs),
        )
        return self.language_model.generate(
            generation_config=generation_config,
            **inputs,
            **lengths_in_new_tokens(generation_config, generate_kwargs),
        )

    def get_input_embeddings(self) -> nn.Module:  # transformers 4 does not find them
        return self.language_model.get_input_embeddings()

    @property
    def language_model(self) -> LlamaForCausalLM:
        """QLLaMA, out of its LoRA wrapper where it has one."""
        qllama = self.qllama
        return qllama.get_base_model() if hasattr(qllama, "get_base_model") else qllama

    @property
    def _decoder(self) -> LlamaModel:
        return self.language_model.model

    def wrap_backbone_lora(
        self, r: int = 128, lora_alpha: int | None = 256, lora_dropout: float = 0.05
    ) -> None:
        """Freezes the vision tower and puts LoRA of rank r on its attention and MLP linears.

        lora_alpha None is 2 * r. Needs peft.
        """
        alpha = lora_alpha or 2 * r
        self.vision_model = wrap_lora(self.vision_model, r, alpha, lora_dropout, VISION_LORA)
        self.config.use_backbone_lora, self.config.backbone_lora_alpha = r, alpha

    def wrap_qllama_lora(
        self, r: int = 128, lora_alpha: int | None = 256, lora_dropout: float = 0.05
    ) -> None:
        """Freezes QLLaMA and puts LoRA of rank r on its self-attention and MLP linears.

        Cross-attention, LM head and embeddings are not adapted. lora_alpha None is 2 * r. Needs
        peft.
        """
        alpha = lora_alpha or 2 * r
        self.qllama = wrap_lora(self.qllama, r, alpha, lora_dropout, QLLAMA_LORA)
        self.config.use_qllama_lora, self.config.qllama_lora_alpha = r, alpha


class InternVL_C(InternVLModel):
    """InternVL-C: contrastive embeddings from the vision tower alone."""

    default_mode = "InternVL-C"


class InternVL_G(InternVLModel):
    """InternVL-G: embeddings from the vision tower and from QLLaMA's queries."""

    default_mode = "InternVL-G"


def unit(embeddings: Tensor) -> Tensor:
    """Rows (B, E) of length one; without an epsilon, as published."""
    return embeddings / embeddings.norm(dim=-1, keepdim=True)
