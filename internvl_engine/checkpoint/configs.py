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

from ..configuration import InternVisionConfig, InternVLConfig
from .contents import Contents
from .errors import CheckpointError, CheckpointNotFoundError, listed
from .families import CROSS_ATTENTION, POSITIONS, Family
from .identify import built_by, check_config, family_of, tower_of
from .keywords import overrides_of
from .locate import Source


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


def read_config(
    config_class: Any, source: Source, config: Any, options: dict[str, Any], contents: Contents
) -> Reading:
    """The configuration of a model class.

    Args:
        config_class: of the composite, or of a tower, which finds its own in the file of a
            composite.
        config: the user's, in place of the file.
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
    values = source.config if config is None else config.to_dict()
    layout = contents.layout
    if values is None and layout is not None and layout.preset:
        values = InternVLConfig.from_preset(layout.preset).to_dict()
    if values is None:
        raise CheckpointNotFoundError(f"{place}: missing; add it, or pass config=")
    check_config(values, config_class, place)
    known = set(inspect.signature(config_class).parameters) | set(values)
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
    own = {tower.fields.get(name, name): value for name, value in own.items()}
    if tower.fields:
        own |= {
            name: _square(name, own[name]) for name in ("image_size", "patch_size") if name in own
        }
    return config_class.from_dict(_plain(own) | overrides)


def _square(name: str, sides: Any) -> Any:
    """One side of a square that another package writes as a pair."""
    if not isinstance(sides, list | tuple):
        return sides
    if len(set(sides)) != 1:
        raise ValueError(f"{name} must be a square, got {sides}")
    return sides[0]


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    dropped = ("model_type", "quantization_config")
    return {name: value for name, value in values.items() if name not in dropped}


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
    family = built_by(type(reading.config))
    adopt_frequency(reading.config, reading.states_frequency, contents)
    adopt_lora(reading.config, family, contents, merge_lora, reading.alphas)
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
    places = {
        int(match[1]) for name in contents.names if (match := re.search(CROSS_ATTENTION, name))
    }
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


def adopt_lora(
    config: Any, family: Family | None, contents: Contents, merge: bool, alphas: dict
) -> None:
    """Writes the ranks of the checkpoint's LoRA matrices into the configuration, 0 where merged.

    Args:
        family: whose composite is loaded; None for a tower.
        alphas: beginning of the names of a tower to alpha, None for 2 * r.

    Raises:
        CheckpointError: a tower alone cannot hold LoRA unmerged, nor a tower two ranks.
    """
    ranks = {linear: sides["A"].shape[0] for linear, sides in contents.lora.items()}
    if family is None:
        if ranks and not merge:
            raise CheckpointError(
                f"{contents.path}: its LoRA does not fit into a tower alone; pass merge_lora=True"
            )
        return
    for start, tower in family.lora.items():
        found = {rank for linear, rank in ranks.items() if linear.startswith(start)}
        if len(found) > 1 and not merge:
            raise CheckpointError(
                f"{contents.path}: LoRA ranks {_numbers(found)} in {start.rstrip('.')}; pass "
                "merge_lora=True"
            )
        rank = 0 if merge else max(found, default=0)
        setattr(config, f"use_{tower}_lora", rank)
        setattr(config, f"{tower}_lora_alpha", (alphas.get(start) or 2 * rank) if rank else None)
