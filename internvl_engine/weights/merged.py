"""Parameters of neighbours that lie one below the other in one storage: q, k, v; gate, up."""

import torch
from torch import Tensor, nn

from .. import kernels
from .packed import PackedTensor, pack


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


def _is_free(part: nn.Parameter) -> bool:
    """Whether a parameter can be given another storage."""
    return part.layout == torch.strided and not part.is_meta and not part.is_inference()


def _lie_below_each_other(whole: Tensor, *parts: Tensor) -> bool:
    position = _address(whole)
    for part in parts:
        if position is None or _address(part) != position or part.dtype != whole.dtype:
            return False
        position += part.nbytes
    return True


def _address(x: Tensor) -> int | None:
    """Of the memory that holds a weight; None where another tensor subclass holds it somewhere."""
    if isinstance(x, PackedTensor):
        x = x.packed
    return x.data_ptr() if type(x) in (Tensor, nn.Parameter) else None


def _storage(x: Tensor) -> int | None:
    is_plain = type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided
    return x.untyped_storage().data_ptr() if is_plain else None
