"""Weights on their way into quantized files: the order of the tensors, one neighbourhood at a time.

    q.packed k.packed v.packed   q.scales k.scales v.scales   q.sums k.sums v.sums   o.packed ...

Neighbours are beside each other in every inner tensor, so that a mapped file has their product's
weight in one piece. What was quantized is held until all of its inner tensors are written, which
are beside each other too.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from ..schemes import Rule
from .dtypes import computes_quantized, dtype_name
from .forms import neighbours, quantize, stored_name
from .registry import Layout, forms
from .rewriting import Read
from .writing import ALIGNMENT, CACHE_LINE, Planned


class Quantizing:
    """Tensors of a file, of which rules make others; without rules, what was planned.

    Args:
        planned: the weights as they are.
        read: gives one of them.
        rules: name of a weight to the rule of its form; the others stay wide.
        make: gives the inner tensors of one that has a rule; None quantizes what `read` gives.
        place: what messages call the checkpoint that the weights come from.

    Raises:
        ValueError: a weight that has a rule is of a dtype that forms do not compute in.
    """

    def __init__(
        self,
        planned: Iterable[Planned],
        read: Read,
        rules: Mapping[str, Rule],
        make: Callable[[str], Mapping[str, Tensor]] | None = None,
        place: str | Path = "",
    ) -> None:
        self.rules, self._read, self._make = rules, read, make or self._quantized
        self._place = place
        self._owners: dict[str, str] = {}  # stored name of an inner tensor to its weight
        self._made: dict[str, Tensor] = {}
        of_name = {each.name: each for each in planned}
        for name in rules:
            if not computes_quantized(of_name[name].dtype):
                raise ValueError(
                    f"{name} in {place}: quantize= needs weights in float32, bfloat16 or float16, "
                    f"and it is {dtype_name(of_name[name].dtype)}: give dtype= also"
                )
        layouts = {
            name: forms().KINDS[rule.form].inner_layout(of_name[name].shape, **rule.options)
            for name, rule in rules.items()
        }
        groups = {run[0]: run for run in neighbours(n for n in of_name if n in rules)}
        self.alignment = CACHE_LINE if rules else ALIGNMENT
        self.planned: list[Planned] = []
        for name, each in of_name.items():
            if name not in rules:
                self.planned.append(each)
            else:
                self._add(groups.get(name, ()), layouts)

    def _add(self, group: tuple[str, ...], layouts: Mapping[str, Layout]) -> None:
        """Plans the inner tensors of neighbours."""
        for inner in dict.fromkeys(inner for name in group for inner in layouts[name]):
            for name in group:
                if inner in layouts[name]:
                    shape, dtype = layouts[name][inner]
                    stored = stored_name(name, inner)
                    self.planned.append(Planned(stored, tuple(shape), dtype, group[0]))
                    self._owners[stored] = name

    def read(self, name: str) -> Tensor:
        """A tensor of the file; each once."""
        if name not in self._owners:
            return self._read(name)
        if name not in self._made:
            owner = self._owners[name]
            inner = self._make(owner)
            self._made |= {stored_name(owner, each): tensor for each, tensor in inner.items()}
        return self._made.pop(name)

    def _quantized(self, name: str) -> Mapping[str, Tensor]:
        weight = self._read(name)
        place = f"{name} in {self._place}"
        return quantize(self.rules[name], weight, weight.dtype, place).inner_tensors()
