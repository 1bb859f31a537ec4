"""The tensors of a checkpoint before they are read: what is stored, and what is made of it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .files import WeightFile
from .grouping import Heads, take


@dataclass(frozen=True)
class Stored:
    """One tensor in its file, not read yet."""

    file: WeightFile
    name: str
    shape: tuple[int, ...]
    dtype: Any

    def read(self) -> Tensor:
        """The tensor, mapped where the format allows."""
        return self.file.read(self.name)

    def __str__(self) -> str:
        return f"{self.name} in {self.file.path}"


@dataclass(frozen=True)
class Stacked:
    """Several stored tensors as one, row after row."""

    pieces: tuple[Stored, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.pieces[0].shape
        return (sum(piece.shape[0] if piece.shape else 0 for piece in self.pieces), *first[1:])

    @property
    def dtype(self) -> Any:
        return self.pieces[0].dtype

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        return torch.cat([piece.read() for piece in self.pieces])

    def __str__(self) -> str:
        return f"{self.pieces[0]} and {len(self.pieces) - 1} more"


@dataclass(frozen=True)
class Grouped:
    """q, k or v out of a stored tensor that has all three, group by group (grouping.py)."""

    packed: Stored
    piece: str
    heads: Heads

    @property
    def shape(self) -> tuple[int, ...]:
        packed = self.packed.shape
        return (self.heads.rows(self.piece, packed[0]), *packed[1:])

    @property
    def dtype(self) -> Any:
        return self.packed.dtype

    def read(self) -> Tensor:
        """The tensor, in memory of its own where its rows are not beside each other."""
        return take(self.packed.read(), self.piece, self.heads)

    def __str__(self) -> str:
        return f"{self.piece} of {self.packed}"


@dataclass(frozen=True)
class Experts:
    """The weights of all experts of a layer, each of them several tensors, row after row."""

    of_expert: tuple[tuple[Stored, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        one = Stacked(self.of_expert[0]).shape
        return (len(self.of_expert), *one)

    @property
    def dtype(self) -> Any:
        return self.of_expert[0][0].dtype

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        return torch.stack([Stacked(pieces).read() for pieces in self.of_expert])

    def __str__(self) -> str:
        return f"{self.of_expert[0][0]} and those of {len(self.of_expert)} experts"


Entry = Stored | Stacked | Grouped | Experts
