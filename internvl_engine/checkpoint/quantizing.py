"""Weights on their way into quantized files: the order of the tensors, one neighbourhood at a time.

    q.packed k.packed v.packed   q.scales k.scales v.scales   q.sums k.sums v.sums   o.packed ...

Neighbours are beside each other in every inner tensor, so that a mapped file has their product's
weight in one piece. What was quantized is held until all of its inner tensors are written, which
are beside each other too.
"""

from collections.abc import Collection, Iterable

from torch import Tensor

from .forms import PACKED, neighbours, stored_name
from .rewriting import Read
from .schemes import Layout, Scheme, forms
from .writing import Planned


class Quantizing:
    """Tensors of a file, of which a scheme makes others.

    Args:
        planned: the weights as they are.
        read: gives one of them.
        scheme: which are held in which form.
        wide: names of those that stay as they are, whatever the scheme says.
    """

    def __init__(
        self, planned: Iterable[Planned], read: Read, scheme: Scheme, wide: Collection[str] = ()
    ) -> None:
        self.scheme, self._read = scheme, read
        self._owners: dict[str, str] = {}  # stored name of an inner tensor to its weight
        self._made: dict[str, Tensor] = {}
        of_name = {each.name: each for each in planned}
        layouts: dict[str, Layout] = {}
        for name, each in of_name.items():
            layout = None if name in wide else scheme.layout(name, each.shape)
            if layout is not None:
                layouts[name] = layout
        groups = {run[0]: run for run in neighbours(layouts)}
        self.planned: list[Planned] = []
        for name, each in of_name.items():
            if name not in layouts:
                self.planned.append(each)
            else:
                self._add(groups.get(name, ()), layouts)

    def _add(self, group: tuple[str, ...], layouts: dict[str, Layout]) -> None:
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
            weight = self.scheme.quantize(owner, self._read(owner))
            inner = forms().inner(weight)
            assert PACKED in inner, f"{owner} stayed wide"
            self._made |= {stored_name(owner, each): tensor for each, tensor in inner.items()}
        return self._made.pop(name)
