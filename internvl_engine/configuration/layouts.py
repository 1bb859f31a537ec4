"""Fields of a chat model in transformers' `internvl` configuration, and ours of them.

Source: transformers, configuration_internvl.py.
"""

from typing import Any

from .language import Language, transformers_language
from .vision import InternVisionConfig

# transformers' name of a field of the vision tower: ours.
VISION_FIELDS = {
    "use_qk_norm": "qk_normalization",
    "attention_bias": "qkv_bias",
    "layer_scale_init_value": "initializer_factor",
    "projection_dropout": "dropout",
}
QK_NORM_EPS = 1e-6  # whatever layer_norm_eps is
# Defaults of transformers' vision tower that are not ours.
_DEFAULTS = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096, "image_size": 448, "norm_type": "layer_norm",
    "qk_normalization": False,
}  # fmt: skip
_DEFAULT_IMAGE_TOKEN = 151667
# What only one value of is computed here.
_FIXED_VISION = {"use_absolute_position_embeddings": True, "use_mean_pooling": True}


def read_vision(values: dict[str, Any] | None) -> dict[str, Any]:
    """The fields of InternVisionConfig of transformers' `vision_config`.

    Raises:
        ValueError: images or patches are no squares, or the tower has parts that ours has not.
    """
    values = values or {}
    if (kind := values.get("model_type", "internvl_vision")) != "internvl_vision":
        raise ValueError(f"vision_config must be that of an internvl_vision, got a {kind}")
    for name, needed in _FIXED_VISION.items():
        if values.get(name, needed) != needed:
            raise ValueError(f"vision_config: {name} must be {needed}, got {values[name]}")
    own = _DEFAULTS | {VISION_FIELDS.get(name, name): value for name, value in values.items()}
    for name in ("image_size", "patch_size"):
        sides = own.get(name)
        if isinstance(sides, list | tuple):
            if len(set(sides)) != 1:
                raise ValueError(f"vision_config: {name} must be a square, got {sides}")
            own[name] = sides[0]
    own.pop("model_type", None)
    return own | {"qk_norm_eps": QK_NORM_EPS}


def read_composite(values: dict[str, Any]) -> dict[str, Any]:
    """Our names for the fields of transformers' `internvl`, which are taken out of values."""
    values.pop("image_seq_length", None)  # of the size of a tile
    layer = values.pop("vision_feature_layer", -1)
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer must be one layer, got {layer}")
    strategy = values.pop("vision_feature_select_strategy", "default")
    if strategy != "default":
        raise ValueError(
            f"vision_feature_select_strategy must be 'default' (without the class token), got "
            f"{strategy!r}"
        )
    return {
        "text_config": values.pop("text_config"),
        "select_layer": layer,
        "img_context_token_id": values.pop("image_token_id", _DEFAULT_IMAGE_TOKEN),
        "ps_version": "v2",
    }


def written_composite(config: Any, language: Language) -> dict[str, Any]:
    """A VisionLanguageConfig as transformers' `internvl`; see its `transformers_dict`."""
    vision = config.vision_config
    if config.ps_version != "v2":
        raise ValueError(
            f"transformers' layout has pixel shuffle v2 only, and this model {config.ps_version}"
        )
    if vision.qk_normalization and vision.qk_eps != QK_NORM_EPS:
        raise ValueError(
            f"transformers' layout has norms of q and k with an epsilon of {QK_NORM_EPS} only, and "
            f"this model {vision.qk_eps}"
        )
    values: dict[str, Any] = {
        "model_type": "internvl",
        "architectures": ["InternVLForConditionalGeneration"],
        "vision_config": _written_vision(vision),
        "text_config": transformers_language(language),
        "image_token_id": config.img_context_token_id,
        "image_seq_length": config.num_image_token,
        "downsample_ratio": config.downsample_ratio,
        "projector_hidden_act": config.projector_hidden_act,
        "vision_feature_layer": config.select_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if config.img_context_token_id is None:
        raise ValueError(
            "transformers' layout stores the id of <IMG_CONTEXT>: set config.img_context_token_id"
        )
    return values


def _written_vision(vision: InternVisionConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in VISION_FIELDS.items()}
    kept = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
            "hidden_act", "attention_dropout", "initializer_range", "norm_type", "layer_norm_eps",
            "num_channels", *theirs)  # fmt: skip
    values = {theirs.get(name, name): getattr(vision, name) for name in kept}
    values["image_size"] = [vision.image_size] * 2
    values["patch_size"] = [vision.patch_size] * 2
    return values | {"model_type": "internvl_vision", **_FIXED_VISION}
