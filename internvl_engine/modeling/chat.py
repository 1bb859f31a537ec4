"""The chat family: InternViT, pixel shuffle, projector and a causal language model.

    features = mlp1(pixel_shuffle(vision_model(pixels)[select_layer] without the class token))
    embeddings of the placeholders in the prompt = features;  language_model(embeddings)

Source: OpenGVLab/InternVL, modeling_internvl_chat.py; Chen et al., InternVL 1.5, 2024.

    T tiles of side S, N tokens a tile (256 at 448 px), D vision width, C width and V vocabulary of
    the language model, B prompts of L tokens
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..checkpoint import Origin, save_chat
from ..configuration import VisionLanguageConfig
from ..configuration.language import language_class
from .assembly import FromParts
from .base import InternVLPreTrainedModel
from .continuation import continue_prompts
from .heads import follow_head
from .lora import ChatLora
from .loss import answer_loss
from .pixel_shuffle import pixel_shuffle, projector, tokens_of_tiles
from .placeholders import (
    check_count,
    check_prompts,
    fill,
    find_placeholders,
    tokens_of_features,
    used_tiles,
)
from .rotary import replace_dynamic_rotary
from .vision import InternVisionModel


class VisionLanguageModel(FromParts, ChatLora, InternVLPreTrainedModel):
    """A chat model; its parameters have the published names.

    `img_context_token_id`, the id of the placeholder, comes from the configuration where that knows
    it, from the tokenizer of a checkpoint, or is set.
    """

    config_class: Any = VisionLanguageConfig
    main_input_name = "pixel_values"
    origin: Origin | None = None  # set by loading

    def __init__(self, config: VisionLanguageConfig) -> None:
        super().__init__(config)
        self.vision_model: Any = InternVisionModel(config.vision_config)
        self.language_model: Any = language_class(config.llm_config)(config.llm_config)
        replace_dynamic_rotary(self.language_model)
        self._no_split_modules = [
            *InternVisionModel._no_split_modules, *(self.language_model._no_split_modules or ()),
        ]  # fmt: skip
        self.post_init()
        self.mlp1 = projector(config)  # after post_init: published ones start as PyTorch's
        self.register_load_state_dict_pre_hook(follow_head)
        if config.use_backbone_lora:
            self.wrap_backbone_lora(config.use_backbone_lora, config.backbone_lora_alpha)
        if config.use_llm_lora:
            self.wrap_llm_lora(config.use_llm_lora, config.llm_lora_alpha)

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        """Features of tiles.

        Args:
            pixel_values: (T, 3, S, S), normalised; cast to the dtype of the weights. S may differ
                from the configured size.

        Returns:
            (T, N, C).

        Raises:
            ValueError: they are no squares, or their patches no multiple of the pixel shuffle's.
            TypeError: they are integers.
        """
        self._tokens_of(pixel_values)
        layer = self.config.select_layer
        pixels = pixel_values.to(self.vision_model.device, self.vision_model.dtype)
        outputs: Any = self.vision_model(
            pixel_values=pixels, output_hidden_states=layer != -1, return_dict=True
        )
        states = outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer]
        shuffled = pixel_shuffle(states[:, 1:], self.config.shuffle_factor, self.config.ps_version)
        # A projector in training is often float32 between towers in bfloat16.
        return self.mlp1(shuffled.to(next(self.mlp1.parameters()).dtype))

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        image_flags: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        loss_weight: Any = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> tuple | CausalLMOutputWithPast:
        """Logits of every token of prompts with images.

        Args:
            pixel_values: (T, 3, S, S), the tiles of all prompts in order; None leaves placeholders
                as the tokens they are.
            input_ids: (B, L).
            attention_mask: (B, L), 1 for tokens. None is all ones.
            position_ids: (B, L); None counts from 0 on (after what the cache holds), padding
                included.
            image_flags: (T,) or (T, 1), 1 for tiles that are used; None is all.
            past_key_values: a transformers Cache.
            labels: (B, L), -100 where there is none: labels[:, i] is what is predicted at i - 1.
            use_cache, output_attentions, output_hidden_states: as transformers takes them.
            return_dict: False returns a tuple.
            loss_weight: (B, L), weights of the labels; a tensor or lists.
            inputs_embeds: (B, L, C), in place of the embeddings of input_ids; those are needed
                where there are tiles.
            logits_to_keep: how many of the last tokens get logits, or which; 0 is all.

        Returns:
            logits (B, L, V) in float32, past_key_values; with labels the loss: the mean
            cross-entropy of the labels (NaN where there is none), or sum(weight * cross-entropy) /
            sum(weight), whose denominator counts the weights of -100 too.

        Raises:
            ValueError: as many placeholders as features are needed, before anything is computed.
        """
        all_logits = isinstance(logits_to_keep, int) and logits_to_keep == 0
        if labels is not None and not all_logits:
            raise ValueError("VisionLanguageModel: labels need all logits, without logits_to_keep")
        embeds = self.embed(pixel_values, input_ids, image_flags, inputs_embeds)
        options = {
            "attention_mask": _beside(embeds, attention_mask),
            "position_ids": _beside(embeds, position_ids),
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "logits_to_keep": None if all_logits else logits_to_keep,
        }
        outputs: Any = self.language_model(
            inputs_embeds=embeds,
            return_dict=True,
            **{name: value for name, value in options.items() if value is not None},
        )
        logits = outputs.logits.float()
        result = CausalLMOutputWithPast(
            loss=None if labels is None else answer_loss(logits, labels, loss_weight),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return result.to_tuple() if return_dict is False else result

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        visual_features: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        image_flags: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Continues prompts.

        Args:
            pixel_values: (T, 3, S, S), the tiles of all prompts in order.
            input_ids: (B, L).
            attention_mask: (B, L), 0 where a prompt is padded; None is all ones. Padding is moved
                to the left, where it must be.
            visual_features: (T, N, C) of `extract_feature`, in place of the tiles.
            image_flags: (T,) or (T, 1), 1 for tiles that are used; None is all.
            generation_config, options: as transformers' `generate`, inputs_embeds too; the end of
                the text is llm_config's unless they say so.

        Returns:
            (B, new tokens) ids without the prompt, or transformers' output object with them.

        Raises:
            ValueError: no prompt, or not as many placeholders as features.
        """
        images = (pixel_values, visual_features, image_flags)
        if "inputs_embeds" in options:  # as `embed` makes them
            if input_ids is not None or any(each is not None for each in images):
                raise ValueError("generate: inputs_embeds stand in place of input_ids and images")
            options["attention_mask"] = attention_mask
            return self.language_model.generate(generation_config=generation_config, **options)
        if input_ids is None:
            raise ValueError("generate: input_ids are needed")
        return continue_prompts(self, images, input_ids, attention_mask, generation_config, options)

    def embed(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor | None,
        image_flags: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        visual_features: Tensor | None = None,
    ) -> Tensor:
        """Embeddings (B, L, C) of prompts, with features at their placeholders.

        Args: as `forward`, and visual_features as `generate`.
        """
        check_prompts(input_ids, inputs_embeds)
        images = pixel_values if visual_features is None else visual_features
        if images is None:
            return self._token_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        rows = self.get_input_embeddings().weight.shape[0]
        placeholders = find_placeholders(input_ids, self.img_context_token_id, rows)
        if visual_features is None:
            tokens = self._tokens_of(images)
        else:
            tokens = tokens_of_features(visual_features, self.config.hidden_size)
        used = used_tiles(image_flags, images.shape[0])
        tiles = images.shape[0] if used is None else int(used.sum())
        check_count(placeholders, tiles, tokens, self.img_context_token_id)
        features = self.extract_feature(images) if visual_features is None else visual_features
        if used is not None:
            features = features[used.to(features.device)]
        embeds = self._token_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        return fill(embeds, placeholders, features)

    def _tokens_of(self, pixel_values: Tensor) -> int:
        """N, the tokens that each of these tiles becomes."""
        patch_size = self.config.vision_config.patch_size
        return tokens_of_tiles(pixel_values, patch_size, self.config.shuffle_factor)

    def _token_embeddings(self, input_ids: Any) -> Tensor:
        table = self.get_input_embeddings()
        device = table.weight.device
        return table(input_ids if device.type == "meta" else input_ids.to(device))

    @property
    def img_context_token_id(self) -> int | None:
        """Id of the placeholder that features replace; None where nobody has said it."""
        return self.config.img_context_token_id

    @img_context_token_id.setter
    def img_context_token_id(self, value: int | None) -> None:
        self.config.img_context_token_id = value

    @property
    def mlp_projector(self) -> nn.Sequential:
        """The name that the projector has elsewhere."""
        return self.mlp1

    @property
    def num_image_token(self) -> int:
        """Tokens that a tile of the configured size becomes."""
        return self.config.num_image_token

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Saves in layout="published" or "transformers", by default the one it was loaded from; see
        `internvl_engine.checkpoint.save_chat`. An assembled model saves its tokenizer too."""
        written = save_chat(self, save_directory, **kwargs)
        if written and self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory)

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)


def _beside(embeds: Tensor, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(embeds.device)
