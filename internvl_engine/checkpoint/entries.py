"""The tensors of a checkpoint before they are read: what is stored, and what is made of it."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .dtypes import dtype_name
from .errors import CheckpointError
from .files import SafetensorsFile, WeightFile
from .forms import assemble, inner_tensors
from .grouping import Heads, take
from .schemes import Scheme


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
        parts: what follows the weight's name to the stored tensor; "" is the packed one.
        scheme: of the checkpoint, which knows the forms.
        dtype: that it computes in where nobody asks for another: of the weight before.
        runs: what follows the weight's name to the stored names of it and its neighbours.
        shape: of the weight, which the model tells (`fitted`).
    """

    parts: dict[str, Stored]
    scheme: Scheme
    dtype: torch.dtype
    runs: dict[str, tuple[str, ...]]
    shape: tuple[int, ...] = ()

    def fitted(self, shape: tuple[int, ...]) -> "Quantized":
        """The same, for a weight of a shape.

        Raises:
            CheckpointError: a weight of that shape has other inner tensors; it names the first.
        """
        found = replace(self, shape=shape)
        inner = inner_tensors(found._like(self.dtype))
        missing = [f"{self}{ending}" for ending in inner if ending not in self.parts]
        if missing:
            raise CheckpointError(f"{self}: {missing[0]} is missing, without which it is of no use")
        for ending, needed in inner.items():
            part = self.parts[ending]
            if (part.shape, part.dtype) != (tuple(needed.shape), needed.dtype):
                raise CheckpointError(
                    f"{part}: needed {dtype_name(needed.dtype)} of shape {tuple(needed.shape)} for "
                    f"a weight of shape {shape}, got {dtype_name(part.dtype)} of {part.shape}"
                )
        return found

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in its form, mapped, for products in a dtype."""
        like = self._like(dtype or self.dtype)
        return assemble(like, {end: self._part(end) for end in inner_tensors(like)})

    def _like(self, dtype: torch.dtype) -> Tensor:
        """A weight of this form and shape without memory."""
        packed = self.parts[""]
        try:
            quantize = self.scheme.form(packed.dtype)
        except ValueError as error:
            raise CheckpointError(f"{packed}: {error}") from error
        return quantize(torch.empty(self.shape, dtype=dtype, device="meta"))

    def _part(self, ending: str) -> Tensor:
        part = self.parts[ending]
        if isinstance(part.file, SafetensorsFile):
            return part.file.read_within(self.runs[ending], part.name)
        return part.read()

    def __str__(self) -> str:
        return str(self.parts[""])


Entry = Stored | Stacked | Grouped | Experts | Quantized
