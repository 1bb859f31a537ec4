"""Gives the weights of a model in memory the forms of a scheme, says so, and takes it back.

    report = accelerate(model, quantize="int8")      with the fused modules, or
    report = quantize(model, "int8")                 alone

Weights of `nn.Linear` and `nn.Embedding` are quantized wherever they are, in known modules and in
others: a product with one goes to the form's operator whoever calls it. One at a time, so that the
model is never in memory twice. Tied weights are one weight in one form. A form that is slower than
the wide weight on a device is not used there (`slower_reason`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import kernels
from .checkpoint.parts import AbsentModule
from .checkpoint.rereading import WideWeights
from .fused import FusedModule
from .schemes import FORMS, SCHEMES, WIDE, Rule, Scheme, scheme_of
from .weights import KINDS, LINEARS, QuantizedTensor, WeightTensor, put, quantized_entries, watch

__all__ = [
    "FORMS",
    "SCHEMES",
    "Quantization",
    "Rule",
    "Scheme",
    "WeightEntry",
    "quantize",
    "quantized_state_dict",
    "scheme_of",
    "slower_reason",
]


@dataclass
class WeightEntry:
    """One parameter of a model: the form it has, and why where it stayed wide."""

    name: str
    form: str
    reason: str
    bytes_before: int
    bytes_after: int


@dataclass
class _Change:
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
    _changes: list[_Change] = field(default_factory=list, repr=False)
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
            if values is None or _checksum(values) != change.checksum:
                values = weight.dense()
                dequantized.append(change.name)
            _put_everywhere(
                change.holders, values.to(weight.device, weight.dtype), change.requires_grad
            )
        self.weights.clear()
        _prepare_fused(self._model)
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


def quantize(
    model: nn.Module,
    scheme: str | Scheme,
    *,
    only_faster: bool = True,
    fused: frozenset[int] = frozenset(),
) -> Quantization:
    """Quantizes the weights of a model, in place.

    They stay parameters of their modules, frozen: a gradient reaches x and biases, and adapters
    beside them train.

    Args:
        model: any module.
        scheme: "int8", "int4", "fp8", or a Scheme.
        only_faster: keep weights wide on devices where their form is slower; False saves memory
            all the same.
        fused: ids of nn.MultiheadAttention modules whose weights are multiplied by a fused module;
            others read them as values, and keep them wide.

    Returns:
        Which weights are in which form, and what stayed wide and why.

    Raises:
        ValueError: there is no such scheme.
    """
    report = Quantization(scheme_of(scheme), _model=model)
    try:
        for found in _parameters(model, fused):
            parameter, name = found.parameter, found.name
            before = parameter.nbytes
            rule, reason = _rule(found, report.scheme, only_faster)
            if rule.form != "wide":
                change = _Change(name, found.holders, parameter.dtype, parameter.requires_grad,
                                 _checksum(_dense(parameter)))  # fmt: skip
                weight = KINDS[rule.form].quantize(_dense(parameter), **rule.options)
                parameter = _put_everywhere(found.holders, weight, False)
                report._changes.append(change)
            form = parameter.FORM if isinstance(parameter, QuantizedTensor) else "wide"
            report.weights.append(WeightEntry(name, form, reason, before, parameter.nbytes))
        _prepare_fused(model)
    except BaseException:
        report.undo()
        raise
    return report


def quantized_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model with its quantized weights as they are held.

    `load_state_dict` of a model that is quantized alike takes it bit for bit. The names are those
    of a quantized checkpoint: `<weight>`, `<weight>.scales` and so on.
    """
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, QuantizedTensor):
            state |= quantized_entries(name, value)
        else:
            state[name] = value.dense() if isinstance(value, WeightTensor) else value.detach()
    return state


def slower_reason(form: str, device: torch.device) -> str | None:
    """Why a form is slower than wide weights on a device, or None where it is not.

    A form whose operator has a kernel there is not: benchmarks/bench_linear_<form>.py. Without one
    the weight is widened at every call, as float8 on every processor.
    """
    names = kernels.backends(f"linear_{form}").get(device.type.upper(), ["reference"])
    if names[0] == "reference":
        return "there is no kernel for it, and it is widened at every call"
    if form == "fp8" and torch.cuda.get_device_capability(device) < (8, 9):
        return "this GPU has no units for float8"
    return None


@dataclass
class _Found:
    """A parameter, and the modules that hold it."""

    name: str
    parameter: Any
    holders: list[tuple[nn.Module, str]] = field(default_factory=list)
    reason: str = ""  # why it cannot be quantized


def _parameters(model: nn.Module, fused: frozenset[int]) -> list[_Found]:
    found: dict[int, _Found] = {}
    for path, module in model.named_modules():
        if isinstance(module, AbsentModule):
            continue
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{path}.{attribute}".lstrip(".")
            entry = found.setdefault(id(parameter), _Found(name, parameter))
            entry.holders.append((module, attribute))
            entry.reason = entry.reason or _unsuited(module, attribute, parameter, fused)
    return list(found.values())


def _unsuited(module: Any, attribute: str, parameter: Any, fused: frozenset[int]) -> str:
    """Why a parameter of a module cannot be quantized, or nothing."""
    if parameter.is_meta or hasattr(module, "_hf_hook"):
        return "it is offloaded, or moved by hooks (device_map)"
    if type(parameter) is not nn.Parameter and not isinstance(parameter, WeightTensor):
        return f"it is a {type(parameter).__name__} already"
    if isinstance(module, nn.Embedding) and attribute == "weight":
        return "its table is renormed as it is read" if module.max_norm is not None else ""
    if isinstance(module, nn.MultiheadAttention) and attribute == "in_proj_weight":
        return "" if id(module) in fused else "its attention is not fused"
    if type(module) in LINEARS and attribute == "weight":
        if type(module) is not nn.Linear and id(module) not in fused:
            return "its attention is not fused"
        return ""
    return "it is not the weight of a Linear or an embedding"


def _rule(found: _Found, scheme: Scheme, only_faster: bool) -> tuple[Rule, str]:
    """What becomes of a parameter, and why where it stays as it is."""
    if found.reason:
        return WIDE, found.reason
    parameter = found.parameter
    if isinstance(parameter, QuantizedTensor):
        return WIDE, "already quantized"
    if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return WIDE, f"it is {parameter.dtype}"
    rule = scheme.rule_for(found.name, parameter.shape)
    if rule.form == "wide":
        small = min(parameter.shape) < scheme.min_size
        return rule, "it is small" if small else "the scheme keeps it wide"
    slower = slower_reason(rule.form, parameter.device) if only_faster else None
    if slower:
        return WIDE, f"{rule.form} is slower on {parameter.device.type}: {slower}"
    return rule, ""


def _put_everywhere(
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


def _prepare_fused(model: nn.Module | None) -> None:
    """Lays the weights of neighbours below each other again, in modules that were fused before."""
    for module in [] if model is None else model.modules():
        if isinstance(module, FusedModule):
            module.prepare()


def _dense(parameter: Tensor) -> Tensor:
    return parameter.dense() if isinstance(parameter, WeightTensor) else parameter.detach()


def _checksum(values: Tensor) -> int:
    """The sum of the bits of a weight, as integers."""
    bits = {2: torch.int16, 4: torch.int32}[values.itemsize]
    return int(values.contiguous().view(bits).sum(dtype=torch.int64))


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
