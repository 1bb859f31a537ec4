"""Which weights of a model are in which form, and the way back."""

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.rereading import WideWeights
from ..fused import FusedModule
from ..schemes import Scheme
from ..weights import QuantizedTensor, put, watch


@dataclass
class WeightEntry:
    """One parameter of a model: the form it has, and why where it stayed wide."""

    name: str
    form: str
    reason: str
    bytes_before: int
    bytes_after: int


@dataclass
class Change:
    """A quantized weight, and what it takes to make it wide again."""

    name: str
    holders: list[tuple[nn.Module, str]]
    dtype: torch.dtype
    requires_grad: bool
    checksum: int


@dataclass
class Quantization:
    """Which weights are in which form; `print` it, or take it back with `undo()`."""

    scheme: Scheme
    weights: list[WeightEntry] = field(default_factory=list)
    _changes: list[Change] = field(default_factory=list, repr=False)
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

    def warn_if_wide(self, stacklevel: int) -> None:
        """Warns where nothing at all is in fewer bits, which nobody asks for."""
        wide = Counter(self.wide.values())
        if wide and len(self.wide) == len(self.weights):
            why = next((reason for reason in wide if "slower" in reason), wide.most_common(1)[0][0])
            warnings.warn(
                f"with quantize={self.scheme.name!r} every weight stays wide here: {why}; "
                "only_faster=False quantizes all the same",
                stacklevel=stacklevel,
            )

    def undo(self, source: str | Path | Mapping[str, Tensor] | None = None) -> list[str]:
        """Makes the weights wide again, with the bits that they had, out of where they came from.

        A weight is read again from the checkpoint that the model was loaded from, or `source`, and
        taken where its bits are those that were quantized: a checksum from then tells. Where there
        is no such weight (the model was never loaded, or was trained since), the wide bits are gone
        and it gets the values that the form has, rounded to its dtype.

        Args:
            source: a checkpoint's folder, file or hub id, or a state dict, in place of the one that
                the model knows.

        Returns:
            Names of the weights that have the form's values.
        """
        changes, self._changes = self._changes, []
        read, dequantized = WideWeights(self._model, source), []
        for change in changes:
            module, attribute = change.holders[0]
            weight: Any = module._parameters.get(attribute)
            if not isinstance(weight, QuantizedTensor):  # replaced since
                continue
            values = read(change.name, change.dtype)
            if values is None or checksum(values) != change.checksum:
                values = weight.dense()
                dequantized.append(change.name)
            put_everywhere(
                change.holders, values.to(weight.device, weight.dtype), change.requires_grad
            )
        self.weights.clear()
        prepare_fused(self._model)
        self._model = None
        return dequantized

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


def put_everywhere(
    holders: list[tuple[nn.Module, str]], weight: Tensor, requires_grad: bool
) -> nn.Parameter:
    """Makes a weight the parameter of all its holders, one object."""
    (first, name), *others = holders
    parameter = put(first, name, weight, requires_grad)
    for module, attribute in others:
        if module._parameters[attribute] is not parameter:
            module._parameters[attribute] = parameter
        watch(module)
    return parameter


def prepare_fused(model: nn.Module | None) -> None:
    """Lays the weights of neighbours below each other again, in modules that were fused before."""
    for module in [] if model is None else model.modules():
        if isinstance(module, FusedModule):
            module.prepare()


def checksum(values: Tensor) -> int:
    """The sum of the bits of a weight, as integers."""
    bits = {2: torch.int16, 4: torch.int32}[values.itemsize]
    return int(values.contiguous().view(bits).sum(dtype=torch.int64))


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
