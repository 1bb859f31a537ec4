"""The vision tower of whatever has one, as an InternVisionModel."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import AbsentModule, CheckpointError, Source, hub_options
from ..checkpoint.identify import family_of
from ..checkpoint.names import translate
from ..configuration import InternVisionConfig
from ..configuration.layouts import read_vision
from .anatomy import VISION
from .vision import DropPath, InternVisionModel


def vision_part(source: Any, options: dict[str, Any]) -> InternVisionModel:
    """A vision tower.

    Args:
        source: directory, weight file or hub id of a checkpoint that has one, or a model that has
            one or is one: ours, itself and not a copy; transformers' or the published one, whose
            weights are shared where they are stored alike.
        options: of `from_pretrained`, for a checkpoint; of an object, dtype and device.

    Raises:
        TypeError: source is neither.
        ValueError: its tower has LoRA.
    """
    if isinstance(source, str | Path):
        _check_stored(source, options)
        return InternVisionModel.from_pretrained(source, **options)
    tower = _tower(source)
    if not isinstance(tower, InternVisionModel):
        tower = _converted(tower, source)
    return move(tower, options)


def _check_stored(source: str | Path, options: dict[str, Any]) -> None:
    """Raises where a config.json tells that there is no vision tower."""
    found = Source.find(source, **hub_options(options))
    values = found.config
    if values is not None and family_of(values) is None and "patch_size" not in values:
        raise CheckpointError(
            f"{found.folder / 'config.json'}: vision must be an InternViT, or a checkpoint that "
            f"has one; this has model_type {values.get('model_type')!r} and no patch_size"
        )


def move(model: Any, options: dict[str, Any]) -> Any:
    """An object to the dtype and device that somebody asked for; "auto" and None ask nothing."""
    dtype, device = options["dtype"], options["device"]
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype.removeprefix("torch."))
    wanted = {"dtype": None if dtype in ("auto", None) else dtype, "device": device}
    changes = {name: value for name, value in wanted.items() if value is not None}
    return model.to(**changes) if changes else model


def _tower(source: Any) -> Any:
    """The vision tower in a model, or the model itself."""
    tower = source
    for name in ("model", *VISION):  # transformers keeps it one level deeper
        inner = tower._modules.get(name) if isinstance(tower, nn.Module) else None
        if inner is not None:
            tower = inner
    if hasattr(tower, "get_base_model"):
        raise ValueError(
            "from_parts: the vision tower has LoRA; merge it first (merge_and_unload()), and wrap "
            "the new model (wrap_backbone_lora)"
        )
    if isinstance(tower, AbsentModule):
        raise ValueError(f"from_parts: {tower.explanation}")
    return tower


def _converted(tower: Any, source: Any) -> InternVisionModel:
    """Ours with the weights of a copy of the published class, or of transformers'."""
    try:
        values = tower.config.to_dict()
        names = translate(tower.state_dict()).stored
        fields = read_vision(values) if "use_qk_norm" in values else values
        with torch.device("meta"):
            ours = InternVisionModel(InternVisionConfig(**fields))
        state = tower.state_dict()
        weights = {
            name: state[pieces[0]] if len(pieces) == 1 else torch.cat([state[p] for p in pieces])
            for name, pieces in names.items()
        }
        ours.load_state_dict(weights, assign=True)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise TypeError(
            "from_parts: vision must be a checkpoint or a model with an InternViT, got "
            f"{type(source).__name__} ({str(error)[:200]})"
        ) from error
    return ours.eval()


def set_drop_path(tower: InternVisionModel, rate: float) -> None:
    """Stochastic depth of a tower's layers, rising linearly from 0 to a rate.

    Raises:
        ValueError: the rate is none.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"from_parts: drop_path_rate must be from 0 to 1, got {rate}")
    layers: Any = tower.encoder.layers
    for index, layer in enumerate(layers):
        own = rate * index / max(len(layers) - 1, 1)
        for name in ("drop_path1", "drop_path2"):
            setattr(layer, name, DropPath(own) if own > 0 else nn.Identity())
    tower.config.drop_path_rate = rate
