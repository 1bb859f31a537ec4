"""Which weights of a model are in which form, and the way back."""

import warnings
from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from ..schemes import Scheme
from .changes import Change, Source, Undone, widen


@dataclass
class WeightEntry:
    """One parameter of a model: the form it has, and why where it stayed wide."""

    name: str
    form: str
    reason: str
    bytes_before: int
    bytes_after: int


@dataclass
class Quantization:
    """Which weights are in which form; `print` it, or take it back with `undo()`.

    `other` has the names of weights that were quantized before and keep a form, its value, that the
    scheme does not give them.
    """

    scheme: Scheme
    weights: list[WeightEntry] = field(default_factory=list)
    other: dict[str, str] = field(default_factory=dict)
    _changes: list[Change] = field(default_factory=list, repr=False)
    _names: list[str] = field(default_factory=list, repr=False)
    _model: nn.Module | None = field(default=None, repr=False)

    @property
    def bytes_before(self) -> int:
        """Bytes of all parameters as they were."""
        return sum(entry.bytes_before for entry in self.weights)

    @property
    def bytes_after(self) -> int:
        """Bytes of all parameters as they are."""
        return sum(entry.bytes_after for entry in self.weights)

    @property
    def wide(self) -> dict[str, str]:
        """Names of the weights that stayed wide, and why."""
        return {each.name: each.reason for each in self.weights if each.form == "wide"}

    def warn(self, stacklevel: int) -> None:
        """Warns where weights are not in the form that was asked for, which nobody expects."""
        wide = Counter(self.wide.values())
        if wide and len(self.wide) == len(self.weights):
            why = next((reason for reason in wide if "slower" in reason), wide.most_common(1)[0][0])
            warnings.warn(
                f"with quantize={self.scheme.name!r} every weight stays wide here: {why}; "
                "only_faster=False quantizes all the same",
                stacklevel=stacklevel + 1,
            )
        if self.other:
            forms = ", ".join(f"{n} x {form}" for form, n in Counter(self.other.values()).items())
            warnings.warn(
                f"with quantize={self.scheme.name!r} weights that are quantized already stay as "
                f"they are: {forms} ({next(iter(self.other))}, ...); undo that first",
                stacklevel=stacklevel + 1,
            )

    def undo(self, source: Source = None) -> list[str]:
        """Makes the weights wide again, with the bits that they had, out of where they came from.

        A weight is read again from the checkpoint that the model was loaded from, or `source`, and
        taken where its bits are those that were quantized, and the form is still what they gave:
        checksums from then tell. Where there is no such weight (the model was never loaded, or was
        trained before), or the form was written to since (an adapter was merged, other weights were
        loaded), it gets the values that the form has, rounded to its dtype, with a warning.

        Weights that were quantized before this call, or as they were loaded, stay so, with a
        warning. With a `source` those whose forms are, bit for bit, what its weights give become
        wide too.

        Args:
            source: a checkpoint's folder, file or hub id, or a state dict, in place of the one that
                the model knows.

        Returns:
            Names of the weights that have the form's values.
        """
        undone = self.take_back(source)
        undone.warn(stacklevel=2)
        return undone.missing + undone.written

    def take_back(self, source: Source = None) -> Undone:
        """As `undo`, without a warning."""
        if self._model is None:
            return Undone()
        undone = widen(self._model, self._changes, self._names, source)
        self.weights.clear()
        self._model, self._changes = None, []
        return undone

    def __str__(self) -> str:
        if not self.weights:
            return "quantize: no weight was quantized"
        before, after = self.bytes_before, self.bytes_after
        lines = [f"quantize: {self.scheme.name}, {_size(before)} of weights became {_size(after)}"]
        groups: dict[tuple[str, str], list[WeightEntry]] = {}
        for entry in self.weights:
            groups.setdefault((entry.form, entry.reason), []).append(entry)
        for (form, reason), entries in groups.items():
            sizes = [_size(sum(e.bytes_before for e in entries))]
            if form != "wide":
                sizes.append(_size(sum(e.bytes_after for e in entries)))
            lines.append(
                f"  {len(entries):4} x {form}, {' to '.join(sizes)}" + f": {reason}" * bool(reason)
            )
        return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
