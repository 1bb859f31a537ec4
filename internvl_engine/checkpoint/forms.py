"""Weights that several stored tensors make: which belong together, and which lie side by side.

<linear>.weight           the first inner tensor, packed
<linear>.weight.<inner>   the others: scales, sums
"""

import re
from collections.abc import Iterable

from .families import NEIGHBOURS

PACKED = "packed"  # the inner tensor that has the name of the weight
_INNER = re.compile(r"^(?P<owner>.*\.weight)\.(?P<inner>\w+)$")


def stored_name(weight: str, inner: str) -> str:
    """What a file calls an inner tensor of a weight."""
    return weight if inner == PACKED else f"{weight}.{inner}"


def inner_names(stored: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Every weight that has more than one stored tensor, and the names of its inner tensors.

    Args:
        stored: names of all tensors of a checkpoint.
    """
    stored = list(stored)
    known = set(stored)
    found: dict[str, tuple[str, ...]] = {}
    for name in stored:
        match = _INNER.match(name)
        if match and match["owner"] in known:
            before = found.get(match["owner"], (PACKED,))
            found[match["owner"]] = (*before, match["inner"])
    return found


def neighbours(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The names of weights, those together whose products are one: q, k, v; gate, up.

    In order, each group where its first is.
    """
    names = list(names)
    known, taken = set(names), set[str]()
    found = []
    for name in names:
        if name in taken:
            continue
        group = next((known.intersection(each) for each in _groups(name)), {name})
        together = tuple(sorted(group, key=_place))
        taken.update(together)
        found.append(together)
    return found


def _groups(name: str) -> list[tuple[str, ...]]:
    """The names that a weight could be beside, its own among them."""
    steps = name.split(".")
    return [
        tuple(".".join((*steps[:place], leaf, *steps[place + 1 :])) for leaf in leaves)
        for place, step in enumerate(steps)
        for leaves in NEIGHBOURS
        if step in leaves
    ]


def _place(name: str) -> tuple[int, ...]:
    """Where a weight stands among its neighbours."""
    steps = name.split(".")
    return tuple(leaves.index(s) for s in steps for leaves in NEIGHBOURS if s in leaves)
