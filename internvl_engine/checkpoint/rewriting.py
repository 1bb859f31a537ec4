"""The weights of a model as another layout has them: renamed, taken apart, packed.

What reading does (names.py, entries.py), the other way round. Tensors pass through one at a time.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .experts import part_experts
from .grouping import PIECES, Heads, pack
from .layouts import Layout
from .writing import Planned

Read = Callable[[str], Tensor]
_SHARED = "lora_A."  # beginning of what follows a linear's name where q, k and v have it in common


@dataclass(frozen=True)
class Target:
    """One tensor of a file that will be written.

    Args:
        planned: its name, shape and dtype.
        sources: names of the weights it is made of.
        piece: which row third of the only source it is; None is all of it.
        expert: which expert of the only source it is, and which of its rows.
        heads: of q, k and v, which the sources are, to be packed; None where there is one source.
    """

    planned: Planned
    sources: tuple[str, ...]
    piece: int | None = None
    expert: tuple[int, slice] | None = None
    heads: Heads | None = None

    def read(self, read: Read) -> Tensor:
        """The tensor, of what `read` gives by the names of the sources."""
        if self.heads is not None:
            q, k, v = map(read, self.sources)
            return pack(q, k, v, self.heads)
        tensor = read(self.sources[0])
        if self.expert is not None:
            number, rows = self.expert
            return tensor[number, rows]
        return tensor if self.piece is None else tensor.chunk(len(PIECES))[self.piece]


def rewrite(
    weights: Iterable[Planned],
    layout: Layout | None,
    heads: Heads | None = None,
    model_type: str | None = None,
) -> dict[str, Target]:
    """What a layout makes of weights, by the names in its files.

    Args:
        weights: by our names, with what peft puts into them.
        layout: None is the published one with the language model's own names.
        heads: of the language model, for layouts that pack q, k and v.
        model_type: of the language model, which tells how files have its experts.

    Raises:
        ValueError: q, k or v of a layer is missing; see `packs`.
    """
    targets: dict[str, Target] = {}
    groups: dict[str, dict[str, Planned]] = {}
    for each in weights:
        if experts := part_experts(each, model_type):
            for planned, number, rows in experts:
                targets[planned.name] = Target(planned, (each.name,), expert=(number, rows))
        elif layout is None:
            targets[each.name] = Target(each, (each.name,))
        elif layout.stacked and (found := layout.stacked.whole_pattern.match(each.name)):
            shape = (each.shape[0] // len(PIECES), *each.shape[1:])
            for place, piece in enumerate(PIECES):
                name = layout.theirs(layout.stacked.piece.format(piece=piece, **found.groupdict()))
                targets[name] = Target(Planned(name, shape, each.dtype), (each.name,), piece=place)
        elif layout.grouped and (found := layout.grouped.piece_pattern.match(each.name)):
            fields = found.groupdict()
            piece = fields.pop("piece")
            name = layout.theirs(layout.grouped.whole.format(**fields))
            groups.setdefault(name, {})[piece] = each
        else:
            name = layout.theirs(each.name)
            targets[name] = Target(Planned(name, each.shape, each.dtype), (each.name,))
    targets |= {name: _packed(name, pieces, heads) for name, pieces in groups.items()}
    return targets


def _packed(name: str, pieces: Mapping[str, Planned], heads: Heads | None) -> Target:
    if _is_shared(name):
        first = next(iter(pieces.values()))
        return Target(Planned(name, first.shape, first.dtype), (first.name,))
    if set(pieces) != set(PIECES) or heads is None:
        raise ValueError(f"{name}: needed q, k and v to pack, got {', '.join(sorted(pieces))}")
    each = [pieces[piece] for piece in PIECES]
    shape = (sum(piece.shape[0] for piece in each), *each[0].shape[1:])
    sources = tuple(piece.name for piece in each)
    return Target(Planned(name, shape, each[0].dtype), sources, heads=heads)


def _is_shared(name: str) -> bool:
    return f".{_SHARED}" in name


def packs(weights: Iterable[Planned], layout: Layout, read: Read) -> bool:
    """Whether a layout that packs q, k and v can hold these weights.

    It cannot where LoRA was put on some of the three, or on each for itself: one packed linear has
    one lora_A.
    """
    assert layout.grouped is not None
    groups: dict[str, dict[str, str]] = {}
    for each in weights:
        if found := layout.grouped.piece_pattern.match(each.name):
            fields = found.groupdict()
            piece = fields.pop("piece")
            groups.setdefault(layout.grouped.whole.format(**fields), {})[piece] = each.name
    for name, pieces in groups.items():
        if not _is_shared(name):
            if set(pieces) != set(PIECES):
                return False
            continue
        first, *others = pieces.values()
        if not all(torch.equal(read(first), read(other)) for other in others):
            return False
    return True
