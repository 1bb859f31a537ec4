"""Configuration of InternVL-14B, and the translation of published `config.json` files.

A published directory says `model_type: "internvl"`, which transformers keeps for another
architecture, so ours is "internvl_14b": `InternVLConfig.from_pretrained` reads either, and
`save_pretrained` writes ours, which `AutoConfig` then serves. Fields: OpenGVLab/InternVL,
configuration_internvl.py.
"""

import copy
from typing import Any

from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from .vision import InternVisionConfig

PUBLISHED_MODEL_TYPE = "internvl"


class InternVLConfig(PretrainedConfig):
    """Configuration of InternVL-14B: vision tower, QLLaMA, queries and poolers.

    Args:
        vision_config: InternVisionConfig or its dict; None is InternViT-6B.
        qllama_config: LlamaConfig or its dict; None is QLLaMA-8B. `num_query_token`,
            `cross_attention_frequency` and `vision_hidden_size` are written into it.
        clip_embed_dim: width E of the embeddings.
        attn_pool_num_heads: heads of both attention poolers.
        num_query_token: learned queries Q.
        label_smoothing: of the contrastive loss in training.
        cross_attention_frequency: cross-attention stands in every how many QLLaMA layers, from 0
            on. None takes the nested value, else 2 (published files keep it in the nested dict
            only).
        use_backbone_lora: LoRA rank of the vision tower, 0 for none.
        use_qllama_lora: LoRA rank of QLLaMA, 0 for none.
        backbone_lora_alpha, qllama_lora_alpha: their alphas; None is twice the rank. Published
            files do not store them.
        force_image_size: side in pixels to which the position table is resized at construction.
        initializer_range: standard deviation of new weights outside the vision tower.
    """

    model_type = "internvl_14b"
    is_composition = True
    sub_configs = {"vision_config": InternVisionConfig, "qllama_config": LlamaConfig}

    def __init__(
        self,
        vision_config: InternVisionConfig | dict | None = None,
        qllama_config: LlamaConfig | dict | None = None,
        clip_embed_dim: int = 768,
        attn_pool_num_heads: int = 16,
        num_query_token: int = 96,
        label_smoothing: float = 0.0,
        cross_attention_frequency: int | None = None,
        use_backbone_lora: int = 0,
        use_qllama_lora: int = 0,
        backbone_lora_alpha: int | None = None,
        qllama_lora_alpha: int | None = None,
        force_image_size: int | None = None,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        for key in ("model_type", "hidden_size", "auto_map"):  # published copies of what we derive
            kwargs.pop(key, None)
        # transformers' default is True, which would make LM head and embedding one tensor.
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)
        self.vision_config = _sub_config(InternVisionConfig, vision_config, {})
        self.qllama_config = _sub_config(LlamaConfig, qllama_config, _QLLAMA_8B)
        if cross_attention_frequency is None:
            cross_attention_frequency = getattr(self.qllama_config, "cross_attention_frequency", 2)
        self.clip_embed_dim = clip_embed_dim
        self.attn_pool_num_heads = attn_pool_num_heads
        self.num_query_token = num_query_token
        self.label_smoothing = label_smoothing
        self.cross_attention_frequency = cross_attention_frequency
        self.use_backbone_lora = use_backbone_lora
        self.use_qllama_lora = use_qllama_lora
        self.backbone_lora_alpha = backbone_lora_alpha
        self.qllama_lora_alpha = qllama_lora_alpha
        self.force_image_size = force_image_size
        self.initializer_range = initializer_range
        self.qllama_config.num_query_token = num_query_token
        self.qllama_config.cross_attention_frequency = cross_attention_frequency
        self.qllama_config.vision_hidden_size = self.vision_config.hidden_size
        self.qllama_config.tie_word_embeddings = False

    @property
    def hidden_size(self) -> int:
        """Width of QLLaMA, which transformers' tools look for at the top level."""
        return self.qllama_config.hidden_size

    @property
    def image_size(self) -> int:
        """Side of the images the model takes, in pixels."""
        return self.force_image_size or self.vision_config.image_size

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):  # type: ignore[override]
        """As transformers', and reads a published `model_type: "internvl"` file as ours."""
        config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if "qllama_config" in config:
            if config.get("model_type") == PUBLISHED_MODEL_TYPE:
                config["model_type"] = cls.model_type
        elif chat := {"llm_config", "text_config"} & set(config):
            raise ValueError(
                f"InternVLConfig: {pretrained_model_name_or_path} is a chat model's configuration "
                f"(it has {chat.pop()}), not one of InternVL-14B; VisionLanguageConfig takes it"
            )
        return config, kwargs

    @classmethod
    def from_preset(cls, name: str) -> "InternVLConfig":
        """One of `PRESETS`.

        Raises:
            ValueError: there is no preset of that name.
        """
        if name not in PRESETS:
            raise ValueError(f"InternVLConfig: presets are {', '.join(PRESETS)}, got {name!r}")
        return cls(**copy.deepcopy(PRESETS[name]))


def _sub_config(kind: type, given: PretrainedConfig | dict | None, default: dict) -> Any:
    if isinstance(given, PretrainedConfig):
        return given
    values = dict(default if given is None else given)
    values.pop("model_type", None)
    return kind(**values)


_QLLAMA_8B: dict[str, Any] = {
    "vocab_size": 49954,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

PRESETS: dict[str, dict[str, Any]] = {
    "14b-224px": {},
    "14b-ft-364px": {"force_image_size": 364},
    "nano": {
        "vision_config": {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "intermediate_size": 192,
            "num_hidden_layers": 3,
            "image_size": 28,
            "patch_size": 7,
            "initializer_range": 0.1,  # about width ** -0.5, to be trained from random weights
            "initializer_factor": 1.0,
        },
        "qllama_config": {
            **_QLLAMA_8B,
            "vocab_size": 256,
            "hidden_size": 80,
            "num_attention_heads": 5,
            "intermediate_size": 192,
            "num_hidden_layers": 4,
            "max_position_embeddings": 128,
            "initializer_range": 0.04,
        },
        "clip_embed_dim": 48,
        "attn_pool_num_heads": 4,
        "num_query_token": 6,
        "initializer_range": 0.1,
    },
}

AutoConfig.register(InternVLConfig.model_type, InternVLConfig, exist_ok=True)
