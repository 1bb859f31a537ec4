"""Gives every parameter of a model on the meta device its tensor, one at a time."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..schemes import Scheme
from .building import place_buffers
from .files import open_weights
from .forms import quantize, rule_of
from .offload import attach
from .placement import DISK, Placement
from .plan import Plan
from .registry import forms


def fill(
    model: nn.Module,
    plan: Plan,
    placement: Placement,
    dtype: torch.dtype,
    offload_folder: str | Path | None,
    progress: bool | None,
    scheme: Scheme | None = None,
) -> None:
    """Reads every weight, puts it on its device, and hooks the offloaded ones.

    Args:
        scheme: that weights are quantized by, one at a time.

    Raises:
        ValueError: weights must be written to disk and there is no offload_folder, or they are to
            be quantized.
    """
    kept: dict[str, Tensor] = {}
    for name in track(plan.names, progress):
        device, storage = placement.of(name)
        rule = None if scheme is None else rule_of(scheme, model, name, plan.entry(name).shape)
        if rule is None:
            tensor = plan.read(name, dtype)
        else:
            tensor = quantize(rule, plan.read(name), dtype, str(plan.entry(name)))
        if storage == DISK and rule is not None:
            raise ValueError(
                f"{name} goes to disk, and quantize= leaves nothing there: write a quantized "
                "checkpoint with `internvl convert --quantize`, and load that"
            )
        if storage is None:
            _assign(model, name, tensor.to(device))
        elif storage == DISK and not plan.is_mapped(name, dtype):
            kept[name] = _on_disk(tensor, name, offload_folder)
        else:
            kept[name] = tensor
    if plan.resize:
        _resize(model, plan.resize)
    for head, embedding in plan.tied.items():
        _tie(model, placement, head, embedding, kept)
    place_buffers(model, placement)
    state = model.state_dict(keep_vars=True)  # without, forms give dense copies of themselves
    left = [name for name, p in state.items() if p.is_meta and name not in kept]
    assert not left, f"nothing was loaded into {left}"
    attach(model, placement, kept)


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    placeholder = module._parameters.get(leaf)
    if placeholder is not None and hasattr(tensor, "__tensor_flatten__"):
        forms().put(module, leaf, tensor)
    elif placeholder is not None:
        module._parameters[leaf] = nn.Parameter(tensor, placeholder.requires_grad)
    else:
        module._buffers[leaf] = tensor


def _tie(
    model: nn.Module, placement: Placement, head: str, embedding: str, kept: dict[str, Tensor]
) -> None:
    """Gives a head the weight of the embedding: the same one, where both lie on one device."""
    device, storage = placement.of(head)
    weight = model.get_parameter(embedding)
    if storage is not None:
        kept[head] = kept.get(embedding, weight.detach())
    elif embedding in kept or weight.device != device:
        _assign(model, head, kept.get(embedding, weight.detach()).to(device))
    else:
        model.get_submodule(head.rpartition(".")[0]).weight = weight


def _on_disk(tensor: Tensor, name: str, folder: str | Path | None) -> Tensor:
    if folder is None:
        raise ValueError(
            f"{name} goes to disk in another dtype than it is stored in: give offload_folder"
        )
    path = Path(folder) / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous()}, path)
    return open_weights(path).read(name)


def _resize(model: Any, size: int) -> None:
    tower = getattr(model, "vision_model", model)
    tower = tower.get_base_model() if hasattr(tower, "get_base_model") else tower
    if tower.embeddings.position_embedding.is_meta:
        raise ValueError("the position table cannot be resized while its block is offloaded")
    vision = tower.config
    tower.resize_pos_embeddings(vision.image_size, size, vision.patch_size)
    if hasattr(model.config, "force_image_size"):
        model.config.force_image_size = size


def track(names: Iterable[str], progress: bool | None) -> Iterator[str]:
    """The names, with a bar on stderr where it is a terminal or where asked for."""
    names = list(names)
    if not (sys.stderr.isatty() if progress is None else progress):
        yield from names
        return
    from tqdm import tqdm

    yield from tqdm(names, desc="Loading weights", unit="tensor", leave=False, file=sys.stderr)
