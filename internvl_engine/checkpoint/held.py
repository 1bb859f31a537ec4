"""The forms that the weights of a model are held in, for who saves them."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from ..schemes import SCHEMES, Rule, Scheme
from .errors import CheckpointError
from .forms import rule_of

State = Mapping[str, Any]


def held_rules(model: nn.Module, state: State, names: Collection[str]) -> dict[str, Rule]:
    """The forms of the weights that are quantized, by name.

    Args:
        model: for messages.
        state: of `state_dict(keep_vars=True)`.
        names: which weights are written.

    Raises:
        CheckpointError: none is.
    """
    found = {
        name: Rule("", weight.FORM, **weight.options)
        for name, weight in state.items()
        if name in names and is_quantized(weight)
    }
    if not found:
        raise CheckpointError(
            f"quantized=True, but no weight of this {type(model).__name__} is quantized: "
            "accelerate(model, quantize=...) does it, or from_pretrained(..., quantize=...)"
        )
    return found


def held_scheme(model: nn.Module, state: State, rules: Mapping[str, Rule]) -> Scheme:
    """The scheme that makes these forms; one that names every weight where none of ours does."""
    for scheme in SCHEMES.values():
        found = {name: rule_of(scheme, model, name, tuple(state[name].shape)) for name in rules}
        if all(
            own is not None and (own.form, own.options) == (rules[name].form, rules[name].options)
            for name, own in found.items()
        ):
            return scheme
    named = (Rule(f"^{re.escape(name)}$", rule.form, rule.group) for name, rule in rules.items())
    return Scheme("as held", tuple(named), min_size=1)


def held_parts(weight: Any) -> dict[str, Tensor]:
    """The inner tensors of a quantized weight, on the CPU."""
    return {name: part.detach().cpu() for name, part in weight.inner_tensors().items()}


def plain(tensor: Tensor) -> Tensor:
    """The values of a tensor in any form, on the CPU."""
    dense = getattr(tensor, "dense", None)
    return (tensor.detach() if dense is None else dense()).cpu()


def is_quantized(tensor: Tensor) -> bool:
    """Whether a weight is held in fewer bits, and not in another order of the same ones."""
    return hasattr(tensor, "FORM")
