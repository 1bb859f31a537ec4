"""Configuration of the chat family: vision tower, pixel shuffle, projector, language model.

Fields: OpenGVLab/InternVL, configuration_internvl_chat.py; transformers, configuration_internvl.py.
"""

import copy
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from .language import Language, read_language, written_language
from .vision import InternVisionConfig


class VisionLanguageConfig(PretrainedConfig):
    """Configuration of a chat model, from the published dict or from transformers' `internvl`.

    Args:
        vision_config: InternVisionConfig or its dict.
        llm_config: configuration of a causal language model, or its dict; `text_config` is
            transformers' name for it.
        select_layer: index of the hidden state of the vision tower that is projected.
        ps_version: "v1" or "v2" of the pixel shuffle.
        downsample_ratio: of the sides of the grid of patches; one over a whole number.
        force_image_size: side S of a tile, in pixels; None is the vision tower's.
        template: name of the published conversation template.
        system_message: in place of the template's sentence; None keeps that.
        dynamic_image_size: whether images are cut into tiles.
        use_thumbnail: whether the whole image follows its tiles.
        pad2square: whether an image that is not cut is padded to a square first.
        min_dynamic_patch, max_dynamic_patch: bounds of the number of tiles.
        use_backbone_lora, use_llm_lora: LoRA ranks, 0 for none.
        backbone_lora_alpha, llm_lora_alpha: their alphas; None is twice the rank.
        img_context_token_id: of the placeholder that features replace; None where unknown.
        llm_architecture: the class that a published llm_config names.
        projector_hidden_act: activation of the projector.
    """

    model_type = "internvl_chat"
    is_composition = True
    sub_configs = {"vision_config": InternVisionConfig, "llm_config": AutoConfig}

    def __init__(
        self,
        vision_config: InternVisionConfig | dict | None = None,
        llm_config: PretrainedConfig | dict | None = None,
        select_layer: int = -1,
        ps_version: str = "v1",
        downsample_ratio: float = 0.5,
        force_image_size: int | None = None,
        template: str | None = None,
        system_message: str | None = None,
        dynamic_image_size: bool = False,
        use_thumbnail: bool = False,
        pad2square: bool = False,
        min_dynamic_patch: int = 1,
        max_dynamic_patch: int = 6,
        use_backbone_lora: int = 0,
        use_llm_lora: int = 0,
        backbone_lora_alpha: int | None = None,
        llm_lora_alpha: int | None = None,
        img_context_token_id: int | None = None,
        llm_architecture: str | None = None,
        projector_hidden_act: str = "gelu",
        **kwargs: Any,
    ) -> None:
        for key in ("model_type", "hidden_size", "auto_map"):
            kwargs.pop(key, None)
        tied = kwargs.pop("tie_word_embeddings", None)
        if not isinstance(vision_config, InternVisionConfig):
            vision_config = InternVisionConfig(**(vision_config or {}))
        self.vision_config = vision_config
        language = read_language(llm_config or {"model_type": "llama"}, published=True)
        if tied is False:
            language.config.tie_word_embeddings = False
        self.llm_config = language.config
        self.llm_architecture = llm_architecture or language.architecture
        self.llm_leftovers = language.leftovers
        self.select_layer = select_layer
        self.ps_version = ps_version
        self.downsample_ratio = downsample_ratio
        self.force_image_size = force_image_size
        self.template = template
        self.system_message = system_message
        self.dynamic_image_size = dynamic_image_size
        self.use_thumbnail = use_thumbnail
        self.pad2square = pad2square
        self.min_dynamic_patch = min_dynamic_patch
        self.max_dynamic_patch = max_dynamic_patch
        self.use_backbone_lora = use_backbone_lora
        self.use_llm_lora = use_llm_lora
        self.backbone_lora_alpha = backbone_lora_alpha
        self.llm_lora_alpha = llm_lora_alpha
        self.img_context_token_id = img_context_token_id
        self.projector_hidden_act = projector_hidden_act
        super().__init__(tie_word_embeddings=language.config.tie_word_embeddings, **kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of the language model, which transformers' tools look for at the top level."""
        return self.llm_config.hidden_size

    @property
    def image_size(self) -> int:
        """Side of a tile, in pixels."""
        return self.force_image_size or self.vision_config.image_size

    def published_dict(self) -> dict[str, Any]:
        """The fields of a published `config.json`."""
        language = Language(self.llm_config, self.llm_architecture, self.llm_leftovers)
        values = copy.deepcopy(super().to_dict())
        values["llm_config"] = written_language(language)
        del values["llm_leftovers"], values["llm_architecture"]
        return values

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        return self.llm_config


AutoConfig.register(VisionLanguageConfig.model_type, VisionLanguageConfig, exist_ok=True)
