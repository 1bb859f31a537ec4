"""Trained projectors: files with the weights of one small module, under whatever prefix."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import CheckpointError, Contents, Source, hub_options


def load_projector(module: nn.Module, source: str | Path, **options: Any) -> None:
    """Gives a module the weights of a file, cast to the dtype that the module has.

    Args:
        module: whose names the file has, alone ("0.weight") or below a prefix ("mlp1.0.weight",
            "model.mm_projector.mlp1.0.weight").
        source: weight file, or directory or hub id of a checkpoint that has them among others.
        options: about the hub, as `from_pretrained`.

    Raises:
        CheckpointNotFoundError: it is not there.
        CheckpointError: names or shapes do not fit, or the file is damaged.
    """
    wanted = module.state_dict()

    def needed(name: str) -> bool:
        return any(name == each or name.endswith(f".{each}") for each in wanted)

    found = Source.find(source, **hub_options(options))
    contents = Contents.read(found, found.weights(needed), needed)
    prefix = _prefix(list(wanted), contents)
    state = {}
    for name, tensor in wanted.items():
        entry = contents.tensors[prefix + name]
        if tuple(entry.shape) != tuple(tensor.shape):
            raise CheckpointError(
                f"{entry}: a projector's {name} must have shape {tuple(tensor.shape)} here, got "
                f"{tuple(entry.shape)}"
            )
        state[name] = entry.read()
    with torch.no_grad():
        module.load_state_dict(state)


def _prefix(wanted: list[str], contents: Contents) -> str:
    """What stands before the wanted names in a checkpoint."""
    names, stored = contents.tensors.keys(), sorted(contents.names)
    first = wanted[0]
    starts = [n.removesuffix(first) for n in names if n == first or n.endswith(f".{first}")]
    fitting = [start for start in starts if all(start + name in names for name in wanted)]
    # Of a chat checkpoint that has a projector and other modules of the same names.
    for start in sorted(fitting, key=lambda each: (not each.endswith("mlp1."), len(each))):
        return start
    raise CheckpointError(
        f"{contents.path}: no projector: needed {', '.join(wanted)}, alone or below one prefix; "
        f"it has {', '.join(stored[:4])}" + ", ..." * (len(stored) > 4)
    )
