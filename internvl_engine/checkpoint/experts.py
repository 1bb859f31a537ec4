"""Mixtures of experts: one tensor an expert in every file, one for all of them in transformers 5.

    files    mlp.experts.3.gate_proj.weight (I, C), up_proj (I, C), down_proj (C, I)
    models   mlp.experts.gate_up_proj (E, 2 * I, C), down_proj (E, C, I)

E experts of width I. Models of transformers 4 are as the files. Source: transformers,
conversion_mapping.py.
"""

import re
from collections.abc import Iterable

from .contents import Contents
from .entries import Experts, Stored
from .writing import Planned

# What a model calls the weights of all experts: what a file calls those of one.
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
# Language models of whose files this is known; GptOss, for one, has them together in files too.
APART = ("qwen2_moe", "qwen3_moe")
_FUSED = re.compile(rf"^(?P<start>.*\.experts)\.(?P<leaf>{'|'.join(FUSED)})$")


def fuse_experts(contents: Contents, wanted: Iterable[str]) -> None:
    """Puts the experts together that a model wants together and a checkpoint has apart.

    Args:
        contents: changed in place.
        wanted: names of the model's weights.
    """
    for name in wanted:
        found = _FUSED.match(name)
        if found is None or name in contents.tensors:
            continue
        of_expert = _experts(contents, found["start"], FUSED[found["leaf"]])
        if of_expert:
            contents.tensors[name] = Experts(tuple(of_expert))
            contents.names.add(name)


def _experts(contents: Contents, start: str, leaves: tuple[str, ...]) -> list[tuple[Stored, ...]]:
    """The tensors of each expert, taken out of the contents, up to the first that is missing."""
    tensors = contents.tensors
    found: list[tuple[Stored, ...]] = []
    while True:
        entries = [tensors.get(f"{start}.{len(found)}.{leaf}.weight") for leaf in leaves]
        stored = tuple(entry for entry in entries if isinstance(entry, Stored))
        if len(stored) != len(leaves):
            break
        found.append(stored)
    for number in range(len(found)):
        for leaf in leaves:
            del tensors[f"{start}.{number}.{leaf}.weight"]
    return found


def part_experts(weight: Planned, model_type: str | None) -> list[tuple[Planned, int, slice]]:
    """The tensors of a file that a model's weight is written as, where it is one of all experts.

    Returns:
        Of each: the tensor, the expert, and which of its rows it is; empty for other weights.
    """
    found = _FUSED.match(weight.name) if model_type in APART else None
    if found is None or len(weight.shape) != 3:
        return []
    experts, rows, columns = weight.shape
    leaves = FUSED[found["leaf"]]
    size = rows // len(leaves)
    return [
        (
            Planned(f"{found['start']}.{i}.{leaf}.weight", (size, columns), weight.dtype),
            i,
            slice(place * size, (place + 1) * size),
        )
        for i in range(experts)
        for place, leaf in enumerate(leaves)
    ]
