"""A Linear whose weight is packed: the CPU's layout of it is the only copy."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels


class Rows:
    """Rows of a pack, and the parameter that is empty while they are its values."""

    def __init__(self, pack: kernels.PackedWeight, rows: slice, parameter: nn.Parameter) -> None:
        self.pack = pack
        self.rows = rows
        self.emptied = [parameter]  # to be popped: torch.compile keeps attributes for some time

    def dense(self) -> Tensor:
        """The values, (F, C)."""
        dense = self.pack.dense()
        start, stop, _ = self.rows.indices(len(dense))
        return dense if stop - start == len(dense) else dense[self.rows].clone()


class PackedLinear(nn.Linear):
    """What a Linear is while its weight is rows of a pack: the same module, of this class.

    While it is, the parameter "weight" is None; what is put there (by torch.func.functional_call)
    is used for as long as it is there.
    """

    packed: Rows

    @staticmethod
    def pack_into(linear: Any, pack: kernels.PackedWeight, rows: slice) -> None:
        """Makes a Linear, whose weight is these rows of pack, a PackedLinear."""
        parameter = linear._parameters["weight"]
        linear.packed = Rows(pack, rows, parameter)
        linear.__class__ = PackedLinear
        linear._parameters["weight"] = None
        parameter.data = parameter.data.new_empty(0)

    def unpack(self) -> None:
        """Becomes an ordinary Linear, with the parameter that it had or what was put there."""
        if self._parameters["weight"] is None:
            parameter = self.packed.emptied.pop()
            parameter.data = self.packed.dense()
            self._parameters["weight"] = parameter
        self.__class__ = nn.Linear  # type: ignore[assignment]
        del self.packed

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """The dense parameter (F, C), unpacked for good."""
        given = self._parameters["weight"]
        if given is not None:
            return given
        self.unpack()
        return self._parameters["weight"]

    def forward(self, x: Tensor) -> Tensor:
        """Only when called as a module: wrapped, hooked, or by the eager layer."""
        if is_packed(self):
            pack = self.packed.pack
            if self.out_features == pack.shape[0]:
                return kernels.linear_packed(x, pack, self.bias)
            if torch.compiler.is_compiling():  # where nothing can be unpacked
                y = kernels.linear_packed(x, pack)[..., self.packed.rows]
                return y if self.bias is None else y + self.bias
        return nn.functional.linear(x, self.weight, self.bias)

    def _apply(self, fn: Callable, recurse: bool = True) -> "PackedLinear":
        dtype = self.packed.pack.dtype
        probe = fn(torch.empty(0, dtype=dtype))
        if probe.dtype != dtype or probe.device.type != "cpu":
            self.unpack()
        return nn.Linear._apply(self, fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if is_packed(self):
            destination[prefix + "weight"] = self.packed.dense()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.unpack()
        nn.Linear._load_from_state_dict(self, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Linear:
        make, arguments, state = self.__reduce_ex__(4)
        copied = memo[id(self)] = make(*arguments)
        weight = state["_parameters"]["weight"]
        memo[id(weight)] = weight  # made for the copy: not to be copied again
        copied.__dict__.update(deepcopy(state, memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable, tuple[type], dict[str, Any]]:
        state = {**self.__dict__, "_parameters": dict(self._parameters)}
        rows = state.pop("packed")
        if is_packed(self):
            weight = nn.Parameter(rows.dense(), rows.emptied[0].requires_grad)
            state["_parameters"]["weight"] = weight
        return object.__new__, (nn.Linear,), state


def is_packed(linear: Any) -> bool:
    """Whether the weight of a module is rows of a pack and nothing else."""
    return type(linear) is PackedLinear and linear._parameters["weight"] is None


def unpack(linears: list[Any]) -> None:
    """Makes those that are packed ordinary again."""
    for linear in linears:
        if type(linear) is PackedLinear:
            linear.unpack()


def pack_of(linears: list[Any]) -> kernels.PackedWeight | None:
    """The pack whose rows are the weights of all these and of no others, if there is one."""
    if not is_packed(linears[0]):
        return None
    pack, num_rows = linears[0].packed.pack, 0
    for linear in linears:
        if not is_packed(linear) or linear.packed.pack is not pack:
            return None
        num_rows += linear.out_features
    return pack if num_rows == pack.shape[0] else None
