"""Which parameters of a model can be quantized, and what becomes of each."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import kernels
from ..checkpoint.parts import AbsentModule
from ..schemes import WIDE, Rule, Scheme
from ..weights import KINDS, LINEARS, QuantizedTensor, WeightTensor


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
class Found:
    """A parameter, and the modules that hold it."""

    name: str
    parameter: Any
    holders: list[tuple[nn.Module, str]] = field(default_factory=list)
    reason: str = ""  # why it cannot be quantized


def parameters(model: nn.Module, fused: frozenset[int]) -> list[Found]:
    """Every parameter of a model once; `fused` as `quantize` takes it."""
    found: dict[int, Found] = {}
    for path, module in model.named_modules():
        if isinstance(module, AbsentModule):
            continue
        for attribute, parameter in module._parameters.items():
            if parameter is None:
                continue
            name = f"{path}.{attribute}".lstrip(".")
            entry = found.setdefault(id(parameter), Found(name, parameter))
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


def rule_of(found: Found, scheme: Scheme, only_faster: bool) -> tuple[Rule, str]:
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


def is_in_form(parameter: Any, rule: Rule) -> bool:
    """False for a weight that is quantized in another form or layout than the rule's."""
    if not isinstance(parameter, QuantizedTensor):
        return True
    if parameter.FORM != rule.form:
        return False
    layout = KINDS[rule.form].inner_layout(tuple(parameter.shape), **rule.options)
    held = {name: (tuple(x.shape), x.dtype) for name, x in parameter.inner_tensors().items()}
    return held == layout
