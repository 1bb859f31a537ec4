"""A checkpoint's tensors by their published names, whatever the layout."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import CheckpointError, listed
from .files import WeightFile, open_weights
from .locate import Location
from .names import LORA, is_standalone, translate


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


class Contents:
    """What a checkpoint holds.

    Attributes:
        tensors: published name to tensor, LoRA's aside; only what `needed` asked for.
        lora: linear's published name to {"A": ..., "B": ...}.
        names: all published names, whether needed or not, LoRA's aside.
        leftovers: stored names that are known and of no use.
        standalone: whether the names were those of the standalone InternVL-C file.
        path: what messages call it.
        parts: the parts it says it holds, where it says so.
    """

    def __init__(self, location: Location, needed: Callable[[str], bool] | None = None) -> None:
        self.path: Path = location.path
        self.parts: str | None = None
        self._files: dict[Path, WeightFile] = {}
        where = self._where(location)
        stored, self.leftovers, doubled = translate(where)
        if doubled:
            raise CheckpointError(
                f"{self.path}: {doubled[0][0]} and {doubled[0][1]} are the same weight"
            )
        self.standalone = is_standalone(where)
        self.names = {name for name in stored if not LORA.match(name)}
        self.tensors: dict[str, Stored] = {}
        self.lora: dict[str, dict[str, Stored]] = {}
        for name, original in stored.items():
            if needed is not None and not needed(name):
                continue
            entry = self._entry(where[original], original, location)
            adapter = LORA.match(name)
            if adapter:
                self.lora.setdefault(adapter["linear"], {})[adapter["side"]] = entry
            else:
                self.tensors[name] = entry
        self._check_pairs()

    def _where(self, location: Location) -> dict[str, Path]:
        """The file of every stored name."""
        if location.shards is not None:
            return {name: location.folder / file for name, file in location.shards.items()}
        assert location.file is not None
        return dict.fromkeys(self._open(location.file).names(), location.file)

    def _open(self, path: Path) -> WeightFile:
        if path not in self._files:
            self._files[path] = open_weights(path)
        return self._files[path]

    def _entry(self, path: Path, name: str, location: Location) -> Stored:
        file = self._open(path)
        if name not in file.names():
            raise CheckpointError(f"{path}: lacks {name}, which {location.index} says is there")
        shape, dtype = file.describe(name)
        return Stored(file, name, shape, dtype)

    def _check_pairs(self) -> None:
        single = [linear for linear, sides in self.lora.items() if set(sides) != {"A", "B"}]
        if single:
            raise CheckpointError(
                f"{self.path}: LoRA needs lora_A and lora_B of a linear; one of them is missing "
                f"for {listed(single)}"
            )

    @property
    def files(self) -> list[Path]:
        """The weight files that were opened."""
        return list(self._files)

    @property
    def opened(self) -> list[WeightFile]:
        """The same, open."""
        return list(self._files.values())

    def under(self, prefix: str) -> "Contents":
        """The tensors below a prefix, by the names that follow it."""
        view = Contents.__new__(Contents)
        view.path, view._files, view.leftovers = self.path, self._files, self.leftovers
        view.standalone, view.parts = self.standalone, self.parts
        cut = len(prefix)
        view.names = {name[cut:] for name in self.names if name.startswith(prefix)}
        view.tensors = {n[cut:]: t for n, t in self.tensors.items() if n.startswith(prefix)}
        view.lora = {n[cut:]: t for n, t in self.lora.items() if n.startswith(prefix)}
        return view
