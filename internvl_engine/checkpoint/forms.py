"""Weights in forms of ours: which take one, what files call their parts, what lies side by side.

<linear>.weight           the first inner tensor, packed
<linear>.weight.<inner>   the others: scales, sums
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..schemes import Rule, Scheme
from .dtypes import computes_quantized
from .errors import CheckpointError
from .families import NEIGHBOURS
from .names import LORA, canonical
from .registry import forms
from .writing import Planned

PANEL = 32  # rows, of which multiples are ranges of every inner tensor
RANGE = 1 << 20  # values that are quantized together
PACKED = "packed"  # the inner tensor that has the name of the weight
_INNER = re.compile(r"^(?P<owner>.*\.weight)\.(?P<inner>\w+)$")


def rule_of(scheme: Scheme, model: nn.Module, name: str, shape: tuple[int, ...]) -> Rule | None:
    """What a scheme makes of a parameter of a model; None where it stays wide.

    Only the weights of Linears and embeddings take a form, and of them no adapter's, which train.
    """
    owner, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(owner)
    takes = type(module) is nn.Linear or (type(module) is nn.Embedding and module.max_norm is None)
    if leaf != "weight" or not takes or LORA.match(canonical(name)):
        return None
    rule = scheme.rule_for(name, shape)
    return None if rule.form == "wide" else rule


def rules_of(scheme: Scheme, model: nn.Module, weights: Iterable[Planned]) -> dict[str, Rule]:
    """The rules of the weights that take a form; of those that a file has under the model's names.

    Args:
        model: on the meta device, or not.
        weights: of a file.
    """
    shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    found = {}
    for each in weights:
        # Experts are linears of their own in transformers 4, and one tensor of three dimensions in
        # 5, which is put together of plain ones.
        if tuple(shapes.get(each.name, ())) == each.shape and ".experts." not in each.name:
            rule = rule_of(scheme, model, each.name, each.shape)
            if rule is not None:
                found[each.name] = rule
    return found


def quantize(rule: Rule, weight: Tensor, dtype: torch.dtype, place: str) -> Any:
    """A weight in the form of a rule, a range of rows at a time: temporaries stay small.

    Args:
        weight: (F, C), wide.
        dtype: that it will compute in.
        place: what messages call the weight and its file.

    Raises:
        CheckpointError: the form has no such values: NaN, infinity, or of int4 too large ones.
    """
    kind = forms().KINDS[rule.form]
    shape = tuple(weight.shape)
    inner = {
        name: torch.empty(size, dtype=own, device=weight.device)
        for name, (size, own) in kind.inner_layout(shape, **rule.options).items()
    }
    filled = dict.fromkeys(inner, 0)
    for rows in weight.split(max(RANGE // shape[1] // PANEL, 1) * PANEL):
        try:
            known = rows if computes_quantized(rows.dtype) else rows.float()
            quantized = kind.quantize(known, **rule.options)
        except ValueError as error:
            raise CheckpointError(f"{place}: {error}") from error
        for name, part in quantized.inner_tensors().items():
            inner[name].narrow(0, filled[name], len(part)).copy_(part)
            filled[name] += len(part)
    return forms().assemble(inner, shape, dtype)


def stored_name(weight: str, inner: str) -> str:
    """What a file calls an inner tensor of a weight."""
    return weight if inner == PACKED else f"{weight}.{inner}"


def inner_names(stored: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Every weight that has more than one stored tensor, and the names of its inner tensors.

    Args:
        stored: names of all tensors of a checkpoint.
    """
    stored = list(stored)
    known = set(stored)
    found: dict[str, tuple[str, ...]] = {}
    for name in stored:
        match = _INNER.match(name)
        if match and match["owner"] in known:
            before = found.get(match["owner"], (PACKED,))
            found[match["owner"]] = (*before, match["inner"])
    return found


def neighbours(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The names of weights, those together whose products are one: q, k, v; gate, up.

    In order, each group where its first is.
    """
    names = list(names)
    known, taken = set(names), set[str]()
    found = []
    for name in names:
        if name in taken:
            continue
        group = next((known.intersection(each) for each in _groups(name)), {name})
        together = tuple(sorted(group, key=_place))
        taken.update(together)
        found.append(together)
    return found


def _groups(name: str) -> list[tuple[str, ...]]:
    """The names that a weight could be beside, its own among them."""
    steps = name.split(".")
    return [
        tuple(".".join((*steps[:place], leaf, *steps[place + 1 :])) for leaf in leaves)
        for place, step in enumerate(steps)
        for leaves in NEIGHBOURS
        if step in leaves
    ]


def _place(name: str) -> tuple[int, ...]:
    """Where a weight stands among its neighbours."""
    steps = name.split(".")
    return tuple(leaves.index(s) for s in steps for leaves in NEIGHBOURS if s in leaves)
