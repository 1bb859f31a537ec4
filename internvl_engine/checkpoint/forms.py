"""Weights in another form than rows of numbers: what reading and writing need to know of them.

A form is a tensor subclass by PyTorch's own protocol: `__tensor_flatten__` names its inner tensors,
`__tensor_unflatten__` makes it of them. A checkpoint has them as

    <linear>.weight           the first inner tensor, packed
    <linear>.weight.<inner>   the others: scales, sums
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .families import NEIGHBOURS

_INNER = re.compile(r"^(?P<owner>.*\.weight)(?P<ending>\.\w+)$")


def is_form(tensor: Tensor) -> bool:
    """Whether a tensor is made of inner ones."""
    return hasattr(tensor, "__tensor_flatten__")


def inner_tensors(tensor: Tensor) -> dict[str, Tensor]:
    """What a weight is made of, by what follows its name in a file."""
    names = tensor.__tensor_flatten__()[0]  # type: ignore[attr-defined]
    endings = ("", *(f".{name}" for name in names[1:]))
    return {end: getattr(tensor, name) for end, name in zip(endings, names, strict=True)}


def assemble(like: Tensor, inner: Mapping[str, Tensor]) -> Tensor:
    """A weight of the form, shape and dtype of another, of inner tensors of its own."""
    names, context = like.__tensor_flatten__()  # type: ignore[attr-defined]
    found = dict(zip(names, inner.values(), strict=True))
    return type(like).__tensor_unflatten__(  # type: ignore[attr-defined]
        found, context, like.shape, like.stride()
    )


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, in its form."""
    if not is_form(tensor) or tensor.device == device:
        return tensor.to(device)
    moved = {end: part.to(device) for end, part in inner_tensors(tensor).items()}
    weight = assemble(tensor, moved)
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(weight, tensor.requires_grad) if is_parameter else weight


def stored_parts(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The endings of the inner tensors of every weight that is stored in a form.

    Args:
        names: of all tensors of the checkpoint.
    """
    names = list(names)
    known = set(names)
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        match = _INNER.match(name)
        if match and match["owner"] in known:
            owner = match["owner"]
            found[owner] = (*found.get(owner, ("",)), match["ending"])
    return found


def neighbours(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The names of weights, those together whose products are one: q, k, v; gate, up.

    In order, each group where its first is.
    """
    names = list(names)
    known, taken = set(names), set()
    found = []
    for name in names:
        if name in taken:
            continue
        group = next((g for g in map(known.intersection, _groups(name)) if name in g), {name})
        together = tuple(sorted(group, key=_place))
        taken.update(together)
        found.append(together)
    return found


def _groups(name: str) -> list[tuple[str, ...]]:
    """The names that a weight could be beside."""
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
