"""A checkpoint's tensors by their published names, whatever the layout."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..schemes import Scheme
from .dtypes import FLOATS, resolve_dtype
from .entries import Entry, Grouped, Quantized, Stacked, Stored
from .errors import CheckpointError, listed
from .files import WeightFile, open_weights
from .forms import PACKED, inner_names, neighbours, stored_name
from .grouping import Heads
from .layouts import Layout
from .locate import Needed, Source, Weights
from .names import LORA, translate
from .quantized import own_settings, stored_scheme


@dataclass
class Contents:
    """What a checkpoint holds.

    Args:
        path: what messages call it.
        tensors: published name to tensor, LoRA's aside; only what was needed.
        lora: linear's published name to {"A": ..., "B": ...}.
        names: all published names, whether needed or not, LoRA's aside.
        leftovers: stored names that are known and of no use.
        layout: the layout of the stored names; None is the published one.
        opened: the weight files that were opened.
        parts: the parts it says it holds, where it says so.
        scheme: that it was quantized by; None where its weights are plain.
    """

    path: Path
    tensors: dict[str, Entry]
    lora: dict[str, dict[str, Entry]]
    names: set[str]
    leftovers: list[str]
    layout: Layout | None
    opened: list[WeightFile]
    parts: str | None = None
    scheme: Scheme | None = None

    @classmethod
    def read(
        cls,
        source: Source,
        weights: Weights,
        needed: Needed | None = None,
        heads: Heads | None = None,
    ) -> "Contents":
        """Reads the headers of a checkpoint's files.

        Args:
            needed: whether a tensor is wanted, by its published name; None wants all.
            heads: of the language model, for layouts that store q, k and v as one tensor.

        Raises:
            CheckpointError: a file is damaged, or the names contradict each other.
        """
        return _Reading(source, weights, heads).contents(needed)

    def under(self, prefix: str) -> "Contents":
        """The tensors below a prefix, by the names that follow it."""
        cut = len(prefix)
        return Contents(
            path=self.path,
            tensors={n[cut:]: t for n, t in self.tensors.items() if n.startswith(prefix)},
            lora={n[cut:]: t for n, t in self.lora.items() if n.startswith(prefix)},
            names={name[cut:] for name in self.names if name.startswith(prefix)},
            leftovers=self.leftovers,
            layout=self.layout,
            opened=self.opened,
            parts=self.parts,
            scheme=self.scheme,
        )

    @property
    def files(self) -> list[Path]:
        """The weight files that were opened."""
        return [file.path for file in self.opened]

    def entry(self, name: str) -> Entry:
        """The tensor of a published name, LoRA's included."""
        adapter = LORA.match(name)
        if adapter and adapter["linear"] in self.lora:
            return self.lora[adapter["linear"]][adapter["side"]]
        return self.tensors[name]


class _Reading:
    """The headers of a checkpoint on their way into Contents."""

    def __init__(self, source: Source, weights: Weights, heads: Heads | None) -> None:
        self.path, self.index, self.heads = source.path, weights.index, heads
        self.files: dict[Path, WeightFile] = {}
        if weights.shards is not None:
            self.where = {name: source.folder / file for name, file in weights.shards.items()}
        else:
            assert weights.file is not None
            self.where = dict.fromkeys(self._open(weights.file).names(), weights.file)
        self.quantized = _StoredForms.of(source, self.where)

    def contents(self, needed: Needed | None) -> Contents:
        names = translate(name for name in self.where if name not in self.quantized.others)
        if names.rivals:
            raise CheckpointError(
                f"{self.path}: it holds the model twice, below {listed(map(repr, names.rivals))}; "
                "save the one alone"
            )
        if names.doubled:
            first, second = names.doubled[0]
            raise CheckpointError(f"{self.path}: {first} and {second} are the same weight")
        tensors: dict[str, Entry] = {}
        lora: dict[str, dict[str, Entry]] = {}
        for name, stored in names.stored.items():
            if needed is not None and not needed(name):
                continue
            adapter = LORA.match(name)
            entry = self._entry(stored, names.grouped.get(name))
            if adapter:
                lora.setdefault(adapter["linear"], {})[adapter["side"]] = entry
            else:
                tensors[name] = entry
        self._check_pairs(lora)
        return Contents(
            path=self.path,
            tensors=tensors,
            lora=lora,
            names={name for name in names.stored if not LORA.match(name)},
            leftovers=names.leftovers,
            layout=names.layout,
            opened=list(self.files.values()),
            scheme=self.quantized.scheme,
        )

    def _open(self, path: Path) -> WeightFile:
        if path not in self.files:
            self.files[path] = open_weights(path)
        return self.files[path]

    def _entry(self, names: tuple[str, ...], rows: str | None) -> Entry:
        pieces = tuple(map(self._piece, names))
        if self.quantized.scheme is not None and (found := self._quantized(pieces[0])):
            return found
        if rows is None:
            return pieces[0] if len(pieces) == 1 else Stacked(pieces)
        packed = pieces[0]
        if self.heads is None:
            raise CheckpointError(
                f"{packed}: q, k and v in one tensor, which a config.json with num_attention_heads "
                "and num_key_value_heads would tell apart; there is none"
            )
        if not packed.shape or not self.heads.fit(packed.shape[0]):
            query, key = self.heads
            raise CheckpointError(
                f"{packed}: needed rows for {query} heads that share {key} key heads, a multiple "
                f"of {query + 2 * key}, got shape {packed.shape}"
            )
        return Grouped(packed, rows, self.heads)

    def _piece(self, name: str) -> Stored:
        path = self.where[name]
        file = self._open(path)
        if name not in file.names():
            raise CheckpointError(f"{path}: lacks {name}, which {self.index} says is there")
        shape, dtype = file.describe(name)
        return Stored(file, name, shape, dtype)

    def _quantized(self, packed: Stored) -> Quantized | None:
        """A weight that is stored in a form; None for a plain one."""
        name, stored = packed.name, self.quantized
        names = stored.inner.get(name, (PACKED,))
        if len(names) == 1 and (packed.dtype in FLOATS or not name.endswith(".weight")):
            return None
        inner = {each: self._piece(stored_name(name, each)) for each in names}
        run = stored.runs.get(name, (name,))
        runs = {each: tuple(stored_name(n, each) for n in run) for each in names}
        return Quantized(inner, runs, stored.dtype)

    def _check_pairs(self, lora: dict[str, dict[str, Entry]]) -> None:
        single = [linear for linear, sides in lora.items() if set(sides) != {"A", "B"}]
        if single:
            raise CheckpointError(
                f"{self.path}: LoRA needs lora_A and lora_B of a linear; one of them is missing "
                f"for {listed(single)}"
            )


@dataclass(frozen=True)
class _StoredForms:
    """What of a checkpoint is stored in forms of ours.

    Args:
        scheme: None where nothing is.
        dtype: of the weights before.
        inner: stored name of a weight to those of its inner tensors.
        runs: stored name of a weight to its own and those of its neighbours.
        others: stored names of the inner tensors that have not the name of their weight.
    """

    scheme: Scheme | None = None
    dtype: torch.dtype = torch.float32
    inner: dict[str, tuple[str, ...]] = field(default_factory=dict)
    runs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    others: frozenset[str] = frozenset()

    @classmethod
    def of(cls, source: Source, stored: Iterable[str]) -> "_StoredForms":
        """Those of a checkpoint, by its config.json and the names in its files."""
        settings = own_settings(source.config)
        if settings is None:
            return cls()
        inner = inner_names(stored)
        every = {stored_name(name, each) for name, names in inner.items() for each in names}
        return cls(
            scheme=stored_scheme(settings, source.folder / "config.json"),
            dtype=resolve_dtype(settings.get("dtype", "float32"), torch.device("cpu")),
            inner=inner,
            runs={name: run for run in neighbours(inner) for name in run},
            others=frozenset(every - set(inner)),
        )
