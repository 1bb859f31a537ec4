"""Configuration of the chat family: vision tower, pixel shuffle, projector, language model.

Fields: OpenGVLab/InternVL, configuration_internvl_chat.py; transformers, configuration_internvl.py.
"""

import copy
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from .language import PUBLISHED, Language, read_language, written_language
from .layouts import read_composite, read_vision, written_composite
from .vision import InternVisionConfig

# What is written into transformers' layout beside its own fields, for us to find again.
_OWN = (
    "force_image_size", "template", "system_message", "dynamic_image_size", "use_thumbnail",
    "pad2square", "min_dynamic_patch", "max_dynamic_patch", "llm_architecture",
)  # fmt: skip


class VisionLanguageConfig(PretrainedConfig):
    """Configuration of a chat model, from the published dict or from transformers' `internvl`.

    Args:
        vision_config: InternVisionConfig or its dict; None is InternViT-6B.
        llm_config: configuration of a causal language model, or its dict. Those of published
            checkpoints become transformers' own (language.py); None is its default LLaMA.
            transformers' files call it `text_config`, and then all their names are understood.
        select_layer: index of the hidden state of the vision tower that is projected; 0 is the
            embeddings, -1 the last.
        ps_version: "v1" or "v2" of the pixel shuffle: v1 transposes the tokens of a tile.
        downsample_ratio: of the sides of the grid of patches; one over a whole number.
        force_image_size: side S of a tile, in pixels; None is the vision tower's. The position
            table keeps the vision tower's own size, and is interpolated when tiles come.
        template: name of the published conversation template.
        system_message: in place of the sentence of the template; None keeps that.
        dynamic_image_size: whether images are cut into tiles.
        use_thumbnail: whether the whole image follows its tiles.
        pad2square: whether an image that is not cut is first padded to a square.
        min_dynamic_patch, max_dynamic_patch: least and most tiles of an image.
        use_backbone_lora, use_llm_lora: LoRA ranks, 0 for none.
        backbone_lora_alpha, llm_lora_alpha: their alphas; None is twice the rank. Published files
            do not store them.
        img_context_token_id: id of the placeholder that features replace; None where unknown, as
            in published files.
        llm_architecture: the class that a published llm_config names; None finds it.
        projector_hidden_act: activation of the projector.

    Raises:
        ValueError: the language model is unknown, or a field has no such value.
    """

    model_type = "internvl_chat"
    is_composition = True
    sub_configs = {"vision_config": InternVisionConfig, "llm_config": AutoConfig}
    initializer_range = 0.02  # of new weights outside the towers

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
        for name in ("model_type", "hidden_size", "auto_map"):  # published copies of what we derive
            kwargs.pop(name, None)
        tied = kwargs.pop("tie_word_embeddings", None)
        theirs = read_composite(kwargs) if "text_config" in kwargs else {}
        if theirs:
            llm_config = theirs["text_config"]
            vision_config = read_vision(vision_config)
        self.vision_config = _vision(vision_config)
        default = {"model_type": "qwen2" if theirs else "llama"}
        language = read_language(llm_config or default, published=not theirs)
        self.llm_config = language.config
        self.llm_architecture = llm_architecture or language.architecture
        self.llm_leftovers = language.leftovers
        self.select_layer = theirs.get("select_layer", select_layer)
        self.ps_version = theirs.get("ps_version", ps_version)
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
        self.img_context_token_id = theirs.get("img_context_token_id", img_context_token_id)
        self.projector_hidden_act = projector_hidden_act
        self.check()
        if theirs and tied is not None:
            self.tie_word_embeddings = tied
        elif isinstance(llm_config, dict) and not theirs and not tied:
            # The main code ties nothing; InternVL3.5's goes by llm_config, and writes both flags.
            if tied is False or language.architecture in PUBLISHED:
                self.tie_word_embeddings = False
        super().__init__(tie_word_embeddings=self.tie_word_embeddings, **kwargs)

    def check(self) -> None:
        """Raises ValueError where a field has no such value."""
        if self.ps_version not in ("v1", "v2"):
            raise ValueError(
                f"VisionLanguageConfig: ps_version must be v1 or v2, got {self.ps_version!r}"
            )
        ratio = self.downsample_ratio
        if not 0 < ratio <= 1 or abs(1 / ratio - round(1 / ratio)) > 1e-6:
            raise ValueError(
                "VisionLanguageConfig: downsample_ratio must be one over a whole number, "
                f"got {ratio}"
            )
        layers = self.vision_config.num_hidden_layers
        if not -layers - 1 <= self.select_layer <= layers:
            raise ValueError(
                f"VisionLanguageConfig: select_layer must be from {-layers - 1} to {layers}, of "
                f"{layers} layers and the embeddings, got {self.select_layer}"
            )

    @property
    def hidden_size(self) -> int:
        """Width of the language model, which transformers' tools look for at the top level."""
        return self.llm_config.hidden_size

    @property
    def image_size(self) -> int:
        """Side of a tile, in pixels."""
        return self.force_image_size or self.vision_config.image_size

    @property
    def shuffle_factor(self) -> int:
        """How many patches of a side become one token."""
        return round(1 / self.downsample_ratio)

    @property
    def num_image_token(self) -> int:
        """Tokens that a tile becomes."""
        grid = self.image_size // self.vision_config.patch_size
        return int(grid**2 * self.downsample_ratio**2)

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the head of the language model is its input embedding."""
        return self.llm_config.tie_word_embeddings

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool) -> None:
        self.llm_config.tie_word_embeddings = value

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """The language model's configuration, for transformers' tools."""
        return self.llm_config

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):  # type: ignore[override]
        """As transformers', and reads transformers' `model_type: "internvl"` file as ours."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if "qllama_config" in config:
            raise ValueError(
                f"VisionLanguageConfig: {pretrained_model_name_or_path} is the configuration of an "
                "InternVL-14B (it has qllama_config), which InternVLConfig takes"
            )
        if "text_config" in config:
            config["model_type"] = cls.model_type
        return config, kwargs

    def published_dict(self) -> dict[str, Any]:
        """The fields of a published `config.json`, as the published code reads them."""
        values = super().to_dict()
        for name in ("llm_leftovers", "llm_architecture", "dtype", "torch_dtype", "_name_or_path"):
            values.pop(name, None)
        values["model_type"] = self.model_type
        values["architectures"] = ["InternVLChatModel"]  # by which servers choose their code
        values["hidden_size"] = self.hidden_size
        values["tie_word_embeddings"] = self.tie_word_embeddings
        values["llm_config"] = written_language(self._language)
        vision = values["vision_config"]
        for name in ("dtype", "_name_or_path"):  # of the folder that a part came from
            vision.pop(name, None)
        if self.dtype is not None:
            dtype = str(self.dtype).removeprefix("torch.")
            for each in (values, vision, values["llm_config"]):
                each["torch_dtype"] = dtype
        return values

    def transformers_dict(self) -> dict[str, Any]:
        """The fields of a `config.json` of transformers' InternVLForConditionalGeneration.

        Ours beside them are kept under their own names, which transformers ignores.

        Raises:
            ValueError: transformers has no such model (pixel shuffle v1, another epsilon of the
                norms of q and k), or img_context_token_id is not known.
        """
        values = written_composite(self, self._language)
        if self.dtype is not None:
            values["dtype"] = str(self.dtype).removeprefix("torch.")
        return values | {name: getattr(self, name) for name in _OWN}

    def to_dict(self) -> dict[str, Any]:
        return self.published_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        """All fields: readers of published files have other defaults."""
        return self.published_dict()

    @property
    def _language(self) -> Language:
        return Language(self.llm_config, self.llm_architecture, copy.deepcopy(self.llm_leftovers))


def _vision(given: InternVisionConfig | dict | None) -> InternVisionConfig:
    if isinstance(given, InternVisionConfig):
        return given
    return InternVisionConfig(**copy.deepcopy(given or {}))


AutoConfig.register(VisionLanguageConfig.model_type, VisionLanguageConfig, exist_ok=True)
