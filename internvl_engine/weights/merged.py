"""Parameters of neighbours that lie one below the other in one storage: q, k, v; gate, up."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from .packed import PackedTensor, pack
from .quantized import QuantizedTensor


class Merged:
    """The parts, each a parameter of its own Linear, and the tensor of all their rows."""

    def __init__(self, parts: list[nn.Parameter], whole: Tensor) -> None:
        self.parts = tuple(parts)
        self.whole = whole

    def holds(self, parts: list[Tensor]) -> bool:
        """Whether these are the parts, and still lie where they were put."""
        same = all(a is b for a, b in zip(self.parts, parts, strict=True))
        return same and _lie_below_each_other(self.whole, *parts)

    def restore(self) -> None:
        """Gives every part that is plain a storage of its own."""
        for part in self.parts:
            if self.shares(part):
                part.data = part.data.clone()

    def shares(self, value: Tensor) -> bool:
        """Whether a plain tensor lies in the storage of the whole."""
        storage = _storage(value)
        return storage is not None and storage == _storage(self.whole)


@torch.no_grad()
def merge(parts: list[nn.Parameter]) -> Merged | None:
    """Packs parameters or lays them below each other.

    Returns:
        None where the parts stay apart: a single one, of different kinds, or of different forms.
    """
    one_kind = len({(part.dtype, part.device, part.shape[1:]) for part in parts}) == 1
    if one_kind and len({type(part) for part in parts}) == 1:
        if isinstance(parts[0], QuantizedTensor):
            return _join(parts)
    if not one_kind or not all(type(part) is nn.Parameter and _is_free(part) for part in parts):
        return None
    if all(kernels.layout_of(part) is not None for part in parts):
        whole: Tensor | None = pack(parts)
        return None if whole is None else Merged(parts, whole)
    if len(parts) == 1:
        return None
    whole = torch.cat([part.data for part in parts])
    sizes = [part.shape[0] for part in parts]
    for part, rows in zip(parts, whole.split(sizes), strict=True):
        part.data = rows
    return Merged(parts, whole)


def _join(parts: list[Any]) -> Merged | None:
    """Quantized weights of one kind as one, copied only where they do not lie so already."""
    first = parts[0]
    if len(parts) == 1 or any(part.shape[0] % first.ROWS for part in parts[:-1]):
        return None
    columns = [[tuple(x.shape[1:]) for x in part.inner_tensors().values()] for part in parts]
    if any(each != columns[0] for each in columns):  # groups of other sizes
        return None
    inner = [_below_each_other(parts, name) for name in first.INNER]
    return Merged(parts, first.with_inner(inner, sum(part.shape[0] for part in parts)))


def _below_each_other(parts: list[Any], name: str) -> Tensor:
    """One inner tensor of all parts, of which theirs are ranges."""
    pieces: list[Tensor] = [getattr(part, name) for part in parts]
    first, count = pieces[0], sum(len(piece) for piece in pieces)
    in_one = len({piece.untyped_storage().data_ptr() for piece in pieces}) == 1
    places = [first.data_ptr()]
    for piece in pieces:
        places.append(places[-1] + piece.nbytes)
    follow = [piece.data_ptr() for piece in pieces] == places[:-1]
    if in_one and follow and all(piece.is_contiguous() for piece in pieces):
        return first.as_strided((count, *first.shape[1:]), first.stride())
    whole = torch.cat(pieces)
    sizes = [len(piece) for piece in pieces]
    for part, rows in zip(parts, whole.split(sizes), strict=True):
        setattr(part, name, rows)
    return whole


def _is_free(part: nn.Parameter) -> bool:
    """Whether a parameter can be given another storage."""
    return part.layout == torch.strided and not part.is_meta and not part.is_inference()


def _lie_below_each_other(whole: Tensor, *parts: Tensor) -> bool:
    memory = _memory(whole)
    if memory is None:
        return False
    position, dtype = memory.data_ptr(), memory.dtype
    for part in parts:
        memory = _memory(part)
        if memory is None or memory.data_ptr() != position or memory.dtype != dtype:
            return False
        position += memory.nbytes
    return True


def _memory(x: Tensor) -> Tensor | None:
    """The plain tensor that holds a weight; None where another subclass holds it somewhere.

    Of a quantized one the first of its inner tensors: they are replaced together.
    """
    if isinstance(x, (PackedTensor, QuantizedTensor)):
        return x.packed
    return x if type(x) in (Tensor, nn.Parameter) else None


def _storage(x: Tensor) -> int | None:
    is_plain = type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided
    return x.untyped_storage().data_ptr() if is_plain else None
