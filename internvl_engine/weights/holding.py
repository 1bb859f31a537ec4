"""Quantized weights as parameters of modules, and what they are in a state dict.

`state_dict()` of a module that holds one has the dense values, which any loader takes; with
`quantized_entries` the names and tensors of a quantized checkpoint:

    <parameter>           packed
    <parameter>.scales    and so on, the other inner tensors

`load_state_dict` takes both: dense values are rounded to the form, those entries are taken as bits.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .fp8 import Fp8Tensor
from .int4 import Int4Tensor
from .int8 import Int8Tensor
from .quantized import QuantizedTensor
from .tensor import swap

KINDS: dict[str, type[QuantizedTensor]] = {
    kind.FORM: kind for kind in (Int8Tensor, Int4Tensor, Fp8Tensor)
}
_BY_BITS = {torch.int8: Int8Tensor, torch.uint8: Int4Tensor, torch.float8_e4m3fn: Fp8Tensor}


def put(module: nn.Module, name: str, weight: Tensor, requires_grad: bool = False) -> nn.Parameter:
    """Makes a weight, in any form, a parameter of a module.

    The parameter that is there stays the same object, which others may hold too; where PyTorch
    refuses that it is replaced, as `Module.to` replaces some.

    Args:
        module: that holds the parameter, or is to hold it.
        name: of the parameter in the module.
        weight: the values.
        requires_grad: of the parameter, where its form is not quantized.
    """
    parameters: Any = module._parameters
    quantized = isinstance(weight, QuantizedTensor)
    needs = requires_grad and not quantized
    held = parameters.get(name)
    if isinstance(held, nn.Parameter) and not held.is_meta:
        if not needs:
            held.requires_grad_(False)
            held.grad = None
        if swap(held, weight):
            held.requires_grad_(needs)
            watch(module)
            return held
    parameters[name] = nn.Parameter(weight, needs)
    watch(module)
    return parameters[name]


def watch(module: nn.Module) -> None:
    """Has the state dict of a module be as this file says while it holds quantized weights."""
    hooks: Any = module._state_dict_hooks
    before: Any = module._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _give_dense]:
        del hooks[key]
    for key in [key for key, hook in before.items() if getattr(hook, "hook", None) is _take_bits]:
        del before[key]
    if any(isinstance(each, QuantizedTensor) for each in module._parameters.values()):
        module.register_state_dict_post_hook(_give_dense)
        module.register_load_state_dict_pre_hook(_take_bits)


def _give_dense(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in module._parameters:
        value = state.get(prefix + name)
        # A Parameter was asked for as it is, by keep_vars.
        if isinstance(value, QuantizedTensor) and not isinstance(value, nn.Parameter):
            state[prefix + name] = value.dense()


def _take_bits(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    parameters: Any = module._parameters
    for name, parameter in parameters.items():
        full = prefix + name
        if not isinstance(parameter, QuantizedTensor):
            continue
        others = [key for key in state if key.startswith(f"{full}.")]
        if not others and (full not in state or state[full].dtype not in _BY_BITS):
            continue
        inner = {key.removeprefix(f"{full}."): state.pop(key) for key in others}
        if full in state:
            inner["packed"] = state[full]
        try:
            state[full] = assemble(inner, tuple(parameter.shape), parameter.dtype)
        except ValueError as error:
            raise ValueError(f"{full}: {error}") from error


def quantized_entries(name: str, weight: QuantizedTensor) -> dict[str, Tensor]:
    """A weight as a quantized checkpoint holds it: the inner tensors by their names."""
    inner = weight.inner_tensors()
    return {name if key == "packed" else f"{name}.{key}": x.detach() for key, x in inner.items()}


def assemble(
    inner: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> QuantizedTensor:
    """The weight that inner tensors are; which form it is the dtype of the packed one says.

    Args:
        inner: "packed", "scales" and so on, by name; taken as they are, mapped ones too.
        shape: (F, C).
        dtype: that it computes with.

    Raises:
        ValueError: the tensors are no weight of that shape in any form.
    """
    packed = inner.get("packed")
    kind = None if packed is None else _BY_BITS.get(packed.dtype)
    if kind is None:
        raise ValueError(
            f"a quantized weight has packed values of {', '.join(map(str, _BY_BITS))}, got "
            f"{', '.join(inner)}" + (": missing packed" if packed is None else f", {packed.dtype}")
        )
    missing = [key for key in kind.INNER if key not in inner]
    beyond = [key for key in inner if key not in kind.INNER]
    if missing or beyond:
        raise ValueError(
            f"a quantized weight in {kind.FORM} is {', '.join(kind.INNER)}, got "
            f"{', '.join(inner)}: missing {', '.join(missing) or 'nothing'}, "
            f"too many {', '.join(beyond) or 'nothing'}"
        )
    return kind(*(inner[key] for key in kind.INNER), shape, dtype)
