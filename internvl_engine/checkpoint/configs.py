"""The configuration a checkpoint is loaded with: its config.json, and the user's wishes."""

import inspect
import os
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from ..configuration import InternVLConfig, VisionLanguageConfig
from ..configuration.layouts import read_vision
from .contents import Contents
from .errors import CheckpointError, CheckpointNotFoundError, listed
from .identify import built_by, check_config, family_of, tower_of
from .keywords import overrides_of
from .locate import Source

# Keywords of chat models that are fields of their vision tower.
OF_VISION = frozenset({"drop_path_rate"})


@dataclass
class Reading:
    """A configuration, and what the file it came from states.

    Args:
        config: of the model class.
        states_frequency: whether cross_attention_frequency was written anywhere.
        overrides: fields that the user set.
        alphas: beginning of the names of a tower to its LoRA's alpha, None where unknown.
        parts: the parts that a partial checkpoint holds; None is all.
    """

    config: Any
    states_frequency: bool
    overrides: dict[str, Any]
    alphas: dict[str, float | None]
    parts: str | None


def fields_of(config: Any, config_class: Any) -> dict[str, Any] | None:
    """The fields of a user's configuration: an object, a dict, or where a config.json is."""
    if isinstance(config, str | os.PathLike):
        return config_class.from_pretrained(config).to_dict()
    if isinstance(config, PretrainedConfig):
        return config.to_dict()
    if config is None or isinstance(config, dict):
        return config
    raise TypeError(
        f"from_pretrained: config must be a {config_class.__name__}, a dict or a path, got "
        f"{type(config).__name__}"
    )


def read_config(
    config_class: Any,
    source: Source,
    config: dict[str, Any] | None,
    options: dict[str, Any],
    contents: Contents,
) -> Reading:
    """The configuration of a model class.

    Args:
        config_class: of the composite, or of a tower, which finds its own in the file of a
            composite.
        config: the fields of the user's, in place of the file.
        options: further keywords of `from_pretrained`: fields that replace those of the file, and
            what transformers would take.
        contents: a layout that comes without a config.json has a preset.

    Raises:
        CheckpointNotFoundError: there is no config.json.
        CheckpointError: it is damaged or describes another architecture.
        TypeError: a keyword is neither known nor a field of the configuration.
        ValueError: a keyword asks for something that is not supported.
    """
    place = "config" if config is not None else source.folder / "config.json"
    values = source.config if config is None else config
    layout = contents.layout
    if values is None and layout is not None and layout.preset:
        values = InternVLConfig.from_preset(layout.preset).to_dict()
    if values is None:
        raise CheckpointNotFoundError(f"{place}: missing; add it, or pass config=")
    if config is not None:
        check_config(values, config_class, place)
    general = PretrainedConfig().to_dict()  # output_hidden_states, for one
    known = {*inspect.signature(config_class).parameters, *values, *general}
    if issubclass(config_class, VisionLanguageConfig):
        known |= OF_VISION
    overrides = overrides_of(options, known)
    if unknown := sorted(set(overrides) - known):
        raise TypeError(
            f"from_pretrained: {listed(unknown)} is neither an argument nor a field of "
            f"{config_class.__name__}"
        )
    stated = _states_frequency(values) or "cross_attention_frequency" in overrides
    try:
        result = _build(config_class, values, overrides)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        if overrides:
            raise
        raise CheckpointError(f"{place}: not a {config_class.__name__} ({error})") from error
    result._name_or_path = str(source.path)
    family = family_of(values)
    alphas = {
        start: values.get(f"{tower}_lora_alpha")
        for start, tower in (family.lora if family else {}).items()
    }
    parts = values.get("parts") or (layout.parts if layout is not None else None)
    return Reading(result, stated, overrides, alphas, parts)


def _build(config_class: Any, values: dict[str, Any], overrides: dict[str, Any]) -> Any:
    family = family_of(values)
    if issubclass(config_class, VisionLanguageConfig):
        return _build_chat(config_class, values, overrides)
    if family is None or built_by(config_class) is not None:
        return config_class.from_dict(_plain(values) | overrides)
    tower = family.towers[tower_of(config_class)]
    own = values[tower.config] if tower.config else values
    if family.builds == InternVLConfig.model_type:  # it writes fields of its own into its towers'
        whole = InternVLConfig.from_dict(_plain(values))
        own = getattr(whole, str(tower.config)).to_dict()
        if family.forces_size and "image_size" in own:
            own["image_size"] = whole.image_size
    if not isinstance(own, dict):
        raise TypeError(f"{tower.config} must be an object, got {own!r}")
    own = read_vision(own) if tower.is_transformers else own
    return config_class.from_dict(_plain(own) | overrides)


def _build_chat(config_class: Any, values: dict[str, Any], overrides: dict[str, Any]) -> Any:
    """The fields of the file may be transformers', those that the user sets are ours."""
    config = config_class.from_dict(_plain(values))
    asked = overrides.get("downsample_ratio", config.downsample_ratio)
    if asked != config.downsample_ratio:
        raise ValueError(
            f"downsample_ratio={asked}: the projector of the checkpoint was made for "
            f"{config.downsample_ratio}"
        )
    for name, value in overrides.items():
        setattr(config.vision_config if name in OF_VISION else config, name, value)
    config.check()
    return config


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    dropped = ("model_type", "quantization_config")
    return {name: value for name, value in values.items() if name not in dropped}


def _states_frequency(values: dict[str, Any]) -> bool:
    name = "cross_attention_frequency"
    nested = values.get("qllama_config")
    return values.get(name) is not None or (isinstance(nested, dict) and name in nested)
