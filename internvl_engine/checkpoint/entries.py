"""The tensors of a checkpoint before they are read: what is stored, and what is made of it."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..schemes import Rule
from .errors import CheckpointError
from .files import SafetensorsFile, WeightFile
from .forms import PACKED
from .grouping import Heads, take
from .registry import forms


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


@dataclass(frozen=True)
class Quantized:
    """A weight in a form of ours, which several stored tensors make.

    Args:
        inner: name of an inner tensor to the stored one.
        runs: name of an inner tensor to the stored names of it and those of its neighbours.
        dtype: that it computes in where nobody asks for another: of the weight before.
        shape: of the weight, which the model tells (`fitted`).
    """

    inner: dict[str, Stored]
    runs: dict[str, tuple[str, ...]]
    dtype: torch.dtype
    shape: tuple[int, ...] = ()

    def fitted(self, shape: tuple[int, ...]) -> "Quantized":
        """The same, for a weight of a shape.

        Raises:
            CheckpointError: these are no inner tensors of such a weight.
        """
        blank = {}
        for name, stored in self.inner.items():
            if not isinstance(stored.dtype, torch.dtype):
                raise CheckpointError(f"{stored}: {stored.dtype} is no dtype of a form of ours")
            blank[name] = torch.empty(stored.shape, dtype=stored.dtype, device="meta")
        try:
            forms().assemble(blank, shape, self.dtype)
        except ValueError as error:
            raise CheckpointError(f"{self}: {error}") from error
        return replace(self, shape=shape)

    @property
    def form(self) -> str:
        """The name of its form, of a weight that was `fitted`."""
        return next(form for form, kind in forms().KINDS.items() if self._layout() in
                    kind.inner_layouts(self.shape))  # fmt: skip

    def is_in(self, rule: Rule) -> bool:
        """Whether it is stored as a rule makes it."""
        kind = forms().KINDS.get(rule.form)
        return kind is not None and self._layout() == kind.inner_layout(self.shape, **rule.options)

    def _layout(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        return {name: (tuple(each.shape), each.dtype) for name, each in self.inner.items()}

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in its form, mapped, for products in a dtype."""
        found = {name: self._read(name) for name in self.inner}
        return forms().assemble(found, self.shape, dtype or self.dtype)

    def _read(self, name: str) -> Tensor:
        stored = self.inner[name]
        if isinstance(stored.file, SafetensorsFile):
            return stored.file.read_within(self.runs[name], stored.name)
        return stored.read()

    def __str__(self) -> str:
        return str(self.inner[PACKED])


Entry = Stored | Stacked | Grouped | Experts | Quantized
