"""The way back: quantized weights made wide with the bits that they were made from."""

import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.names import canonical
from ..checkpoint.rereading import WideWeights
from ..fused import FusedModule
from ..weights import QuantizedTensor, put, watch
from .plan import Found, parameters

Holders = list[tuple[nn.Module, str]]
Source = str | Path | Mapping[str, Tensor] | None


@dataclass
class Change:
    """A weight that was quantized, and what it takes to make it wide again.

    `wide` and `form` are checksums: of the weight as it was, and of what it became.
    """

    name: str
    holders: Holders
    dtype: torch.dtype
    requires_grad: bool
    wide: int
    form: int


@dataclass
class Undone:
    """What became of quantized weights that were to be wide again, where it is not their bits.

    Args:
        missing: have the values of their forms, as no checkpoint has them as they were.
        written: have the values of their forms, as something was written to these since.
        left: are quantized still.
    """

    missing: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def warn(self, stacklevel: int) -> None:
        """Says so, where there are any."""
        messages = {
            "are in no checkpoint that this model knows as they were before they were quantized, "
            "and have the rounded values now; undo(source=...) names one": self.missing,
            "were written to since they were quantized, and have the rounded values now": (
                self.written
            ),
            "stay quantized, since the call that is undone did not do it: the model was loaded "
            "quantized, or another call did it. Load the wide checkpoint, or name it with "
            "undo(source=...), or undo the other call": self.left,
        }
        for message, names in messages.items():
            if names:
                count = f"{len(names)} weights ({names[0]}{', ...' * (len(names) > 1)})"
                warnings.warn(f"undo: {count} {message}", stacklevel=stacklevel + 1)


def widen(
    model: nn.Module, changes: Sequence[Change], names: Iterable[str], source: Source
) -> Undone:
    """Makes the quantized weights of a model wide.

    Args:
        model: that holds them.
        changes: how they were quantized. Others become wide only with a `source` that has weights
            whose forms they are, bit for bit.
        names: of the model's parameters when they were quantized; an adapter renames them.
        source: a checkpoint or a state dict; None is the checkpoint that the model knows.

    Raises:
        CheckpointError: `source` is no checkpoint that can be read; nothing was changed.
    """
    undone = Undone()
    if changes:
        read = WideWeights(model, names, source)
        for change in changes:
            for holders in _apart(change.holders):
                _undo(change, holders, read, undone)
        made = {canonical(change.name): change for change in changes}
        for found in _quantized(model):  # in copies of modules that stand where those were
            if known := made.get(canonical(found.name)):
                _undo(known, found.holders, read, undone)
    others = list(_quantized(model))
    if others and source is not None:
        read = WideWeights(model, [each.name for each in others], source)
        others = [each for each in others if not _take(each, read)]
    undone.left += [each.name for each in others]
    prepare_fused(model)
    return undone


def _undo(change: Change, holders: Holders, read: WideWeights, undone: Undone) -> None:
    """Makes one weight wide, and says where it has the values of its form."""
    weight: Any = holders[0][0]._parameters[holders[0][1]]
    values = None
    if form_checksum(weight) != change.form:
        undone.written.append(change.name)
    else:
        values = read(change.name, change.dtype)
        if values is None or checksum(values) != change.wide:
            values = None
            undone.missing.append(change.name)
    values = weight.dense() if values is None else values.to(weight.device, weight.dtype)
    put_everywhere(holders, values, change.requires_grad)


def _take(found: Found, read: WideWeights) -> bool:
    """Makes a weight wide whose form is that of the one in a checkpoint; False where it is not."""
    weight = found.parameter
    values = None if weight.is_meta else read(found.name, weight.dtype)
    if values is None or values.shape != weight.shape:
        return False
    values = values.to(weight.device)
    if form_checksum(type(weight).quantize(values, **weight.options)) != form_checksum(weight):
        return False
    put_everywhere(found.holders, values, False)
    return True


def _quantized(model: nn.Module) -> Iterator[Found]:
    for found in parameters(model, frozenset()):
        if isinstance(found.parameter, QuantizedTensor):
            yield found


def _apart(holders: Holders) -> list[Holders]:
    """Those that hold a quantized weight still, by the weight: tied ones may be tied no more."""
    found: dict[int, Holders] = {}
    for module, attribute in holders:
        weight: Any = module._parameters.get(attribute)
        if isinstance(weight, QuantizedTensor):
            found.setdefault(id(weight), []).append((module, attribute))
    return list(found.values())


def put_everywhere(holders: Holders, weight: Tensor, requires_grad: bool) -> nn.Parameter:
    """Makes a weight the parameter of all its holders, one object."""
    (first, name), *others = holders
    parameter = put(first, name, weight, requires_grad)
    for module, attribute in others:
        if module._parameters[attribute] is not parameter:
            module._parameters[attribute] = parameter
        watch(module)
    return parameter


def prepare_fused(model: nn.Module) -> None:
    """Lays the weights of neighbours below each other again, in modules that were fused before."""
    for module in model.modules():
        if isinstance(module, FusedModule):
            module.prepare()


def checksum(*tensors: Tensor) -> int:
    """Of the bytes of tensors in their order; several GB/s."""
    found = 0
    for values in tensors:
        flat = values.detach().cpu().contiguous().flatten()
        found = zlib.crc32(flat.view(torch.uint8).numpy().data, found)
    return found


def form_checksum(weight: QuantizedTensor) -> int:
    """Of what a quantized weight holds."""
    return checksum(*weight.inner_tensors().values())
