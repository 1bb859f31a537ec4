"""The configuration a checkpoint is loaded with: its config.json, the user's wishes, its weights.

What the published files leave out, the weights decide: LoRA ranks, the grid of the position table,
and the frequency of cross-attention where no file states it.
"""

import inspect
import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from ..configuration import InternVisionConfig, InternVLConfig
from .contents import Contents
from .errors import CheckpointError, CheckpointNotFoundError, listed
from .locate import Location
from .names import CROSS_ATTENTION, POSITIONS

TOWERS = {"vision_model": "backbone", "qllama": "qllama"}  # to the fields' names in the config


@dataclass
class Reading:
    """A configuration, and what the file it came from states.

    Args:
        config: of the model class.
        states_frequency: whether cross_attention_frequency was written anywhere.
        alphas: beginning of the names of a tower to its LoRA's alpha, None where unknown.
        parts: the parts that a partial checkpoint holds; None is all.
    """

    config: Any
    states_frequency: bool
    alphas: dict[str, float | None]
    parts: str | None


def read_config(
    config_class: Any, location: Location, config: Any, overrides: dict[str, Any], standalone: bool
) -> Reading:
    """The configuration of a model class.

    Args:
        config_class: InternVLConfig, InternVisionConfig or LlamaConfig; towers find theirs in the
            file of a composite.
        config: the user's, in place of the file.
        overrides: fields that replace those of the file.
        standalone: the standalone C file comes without a config.json and is a 14B at 224 px.

    Raises:
        CheckpointNotFoundError: there is no config.json.
        CheckpointError: it is damaged or describes another architecture.
        TypeError: an override is no field of the configuration.
    """
    values = location.json("config.json") if config is None else config.to_dict()
    if values is None and standalone:
        values = InternVLConfig.from_preset("14b-224px").to_dict()
    if values is None:
        raise CheckpointNotFoundError(
            f"{location.folder / 'config.json'}: missing; add it, or pass config="
        )
    composite = "vision_config" in values and "qllama_config" in values
    stated = _states_frequency(values) or "cross_attention_frequency" in overrides
    known = set(inspect.signature(config_class).parameters) | set(values)
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise TypeError(
            f"from_pretrained: {listed(unknown)} is neither an argument nor a field of "
            f"{config_class.__name__}"
        )
    try:
        result = _build(config_class, values, overrides, composite)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        if overrides:
            raise
        place = "config" if config is not None else location.folder / "config.json"
        raise CheckpointError(f"{place}: not a {config_class.__name__} ({error})") from error
    result._name_or_path = str(location.path)
    alphas = {f"{tower}.": values.get(f"{field}_lora_alpha") for tower, field in TOWERS.items()}
    return Reading(result, stated, alphas, values.get("parts") or ("c" if standalone else None))


def _build(config_class: Any, values: dict, overrides: dict, composite: bool) -> Any:
    if issubclass(config_class, InternVLConfig):
        if not composite:
            raise ValueError(
                f"it has model_type {values.get('model_type')!r} and no vision_config and "
                "qllama_config: another architecture"
            )
        return config_class.from_dict(_plain(values) | overrides)
    if not composite:
        return config_class.from_dict(_plain(values) | overrides)
    whole = InternVLConfig.from_dict(_plain(values))
    if issubclass(config_class, InternVisionConfig):
        tower: PretrainedConfig = whole.vision_config
        tower.image_size = whole.image_size
    else:
        tower = whole.qllama_config
    return config_class.from_dict(tower.to_dict() | overrides)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "model_type"}


def _states_frequency(values: dict[str, Any]) -> bool:
    name = "cross_attention_frequency"
    nested = values.get("qllama_config")
    return values.get(name) is not None or (isinstance(nested, dict) and name in nested)


def adopt(
    reading: Reading, contents: Contents, merge_lora: bool, asked_size: int | None
) -> int | None:
    """Writes into the configuration what the weights decide.

    Args:
        asked_size: side in pixels the user wants the position table to be for.

    Returns:
        The size to which the position table must be resized once it is loaded, or None.

    Raises:
        CheckpointError: the weights contradict the configuration, or each other.
    """
    adopt_frequency(reading.config, reading.states_frequency, contents)
    adopt_lora(reading.config, contents, merge_lora, reading.alphas)
    return adopt_positions(reading.config, contents, asked_size)


def adopt_frequency(config: Any, stated: bool, contents: Contents) -> None:
    """Compares the frequency of cross-attention with the layers that have it.

    Raises:
        CheckpointError: no frequency fits, or another than the configuration states.
    """
    if isinstance(config, InternVisionConfig):
        return
    decoder = getattr(config, "qllama_config", config)
    layers = decoder.num_hidden_layers
    places = {int(match[1]) for name in contents.names if (match := CROSS_ATTENTION.search(name))}
    if not places:
        return
    current = getattr(decoder, "cross_attention_frequency", 2)
    if places == set(range(0, layers, current)):
        return
    fitting = [f for f in range(1, layers + 1) if places == set(range(0, layers, f))]
    if stated or not fitting:
        advice = f"; cross_attention_frequency={fitting[0]} fits them" if fitting else ""
        raise CheckpointError(
            f"{contents.path}: with cross_attention_frequency {current}, layers "
            f"{_numbers(range(0, layers, current))} of {layers} need cross_attn weights; "
            f"the checkpoint has them in layers {_numbers(places)}{advice}"
        )
    for part in {id(config): config, id(decoder): decoder}.values():
        part.cross_attention_frequency = fitting[0]


def _numbers(layers: Iterable[int]) -> str:
    layers = sorted(layers)
    return ", ".join(map(str, layers[:12])) + (", ..." if len(layers) > 12 else "")


def adopt_positions(config: Any, contents: Contents, asked: int | None) -> int | None:
    """Sets the image size to the one the checkpoint's position table is for.

    Args:
        asked: force_image_size where the user asks for one.

    Returns:
        The size to which the loaded table must then be resized, or None.
    """
    name = next((n for n in contents.tensors if re.search(rf"(^|\.){POSITIONS}$", n)), None)
    vision = getattr(config, "vision_config", config)
    if name is None or not isinstance(vision, InternVisionConfig):
        return None
    shape = contents.tensors[name].shape
    side = math.isqrt(shape[1] - 1) if len(shape) == 3 and shape[1] > 1 else 0
    if side == 0 or 1 + side * side != shape[1]:
        raise CheckpointError(
            f"{contents.tensors[name]}: needed shape (1, 1 + side * side, {vision.hidden_size}), "
            f"got {shape}"
        )
    force = getattr(config, "force_image_size", None)
    wanted = (force or vision.image_size) // vision.patch_size
    if side == wanted:
        return None
    size = side * vision.patch_size
    if asked is None:
        warnings.warn(
            f"{contents.path}: the configuration says {force or vision.image_size} px, the "
            f"position table is for {size} px; taking {size} px (force_image_size= resizes it)",
            stacklevel=4,
        )
    vision.image_size = size
    if force:
        config.force_image_size = None if asked else size
    return asked


def adopt_lora(config: Any, contents: Contents, merge: bool, alphas: dict) -> None:
    """Writes the ranks of the checkpoint's LoRA matrices into the configuration, 0 where merged.

    Args:
        alphas: beginning of the names of a tower to alpha, None for 2 * r.

    Raises:
        CheckpointError: a tower alone cannot hold LoRA unmerged, nor a tower two ranks.
    """
    ranks = {linear: sides["A"].shape[0] for linear, sides in contents.lora.items()}
    if not isinstance(config, InternVLConfig):
        if ranks and not merge:
            raise CheckpointError(
                f"{contents.path}: its LoRA does not fit into a tower alone; pass merge_lora=True"
            )
        return
    for tower, field in TOWERS.items():
        found = {rank for linear, rank in ranks.items() if linear.startswith(f"{tower}.")}
        if len(found) > 1 and not merge:
            raise CheckpointError(
                f"{contents.path}: LoRA ranks {_numbers(found)} in {tower}; pass merge_lora=True"
            )
        rank = 0 if merge else max(found, default=0)
        setattr(config, f"use_{field}_lora", rank)
        setattr(config, f"{field}_lora_alpha", (alphas[f"{tower}."] or 2 * rank) if rank else None)
