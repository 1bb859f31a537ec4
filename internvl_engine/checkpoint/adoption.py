"""What the weights of a checkpoint decide, where its configuration says nothing or another thing.

LoRA ranks, the grid of the position table, and the frequency of cross-attention where no file
states it: the published files leave them out.
"""

import math
import re
import warnings
from collections.abc import Iterable
from typing import Any

from ..configuration import InternVisionConfig
from .configs import Reading
from .contents import Contents
from .errors import CheckpointError
from .families import CROSS_ATTENTION, POSITIONS, Family
from .identify import built_by


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
    return adopt_positions(reading.config, family, contents, asked_size)


def adopt_frequency(config: Any, stated: bool, contents: Contents) -> None:
    """Compares the frequency of cross-attention with the layers that have it.

    Raises:
        CheckpointError: no frequency fits, or another than the configuration states.
    """
    if isinstance(config, InternVisionConfig):
        return
    places = {
        int(match[1]) for name in contents.names if (match := re.search(CROSS_ATTENTION, name))
    }
    if not places:
        return
    decoder = getattr(config, "qllama_config", config)
    layers = decoder.num_hidden_layers
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


def adopt_positions(
    config: Any, family: Family | None, contents: Contents, asked: int | None
) -> int | None:
    """Sets the image size to the one the checkpoint's position table is for.

    Args:
        family: whose composite is loaded; None for a tower.
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
    size = side * vision.patch_size
    forces = family is None or family.forces_size
    # A chat model interpolates to force_image_size: its table is for the tower's own image_size.
    force = getattr(config, "force_image_size", None) if forces else asked
    if side == (force or vision.image_size) // vision.patch_size:
        if not forces:
            vision.image_size = force or vision.image_size
        return None
    if asked is None:
        warnings.warn(
            f"{contents.path}: the configuration says {force or vision.image_size} px, the "
            f"position table is for {size} px; taking {size} px (force_image_size= resizes it)",
            stacklevel=6,
        )
    vision.image_size = size
    if forces and force:
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
