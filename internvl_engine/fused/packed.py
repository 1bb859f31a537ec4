"""A Linear whose weight is packed: the CPU's layout of it is the only copy."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels


class PackedLinear(nn.Linear):
    """What a Linear is while its weight is rows of a pack: the same module, of this class.

    While it is, the parameter "weight" is None; what is put there (by torch.func.functional_call)
    is used for as long as it is there.
    """

    pack: kernels.PackedWeight
    rows: slice

    @staticmethod
    def pack_into(linear: Any, pack: kernels.PackedWeight, rows: slice) -> None:
        """Makes a Linear, whose weight is these rows of pack, a PackedLinear."""
        parameter = linear._parameters["weight"]
        hidden = {"pack": pack, "rows": rows, "emptied": parameter}  # no submodules, no parameters
        linear.__dict__.update(hidden)
        linear.__class__ = PackedLinear
        linear._parameters["weight"] = None
        parameter.data = parameter.data.new_empty(0)

    def unpack(self) -> None:
        """Becomes an ordinary Linear, with the parameter that it had or what was put there."""
        if self._parameters["weight"] is None:
            parameter = self.__dict__["emptied"]
            parameter.data = self._dense()
            self._parameters["weight"] = parameter
        self.__class__ = nn.Linear
        for name in ("pack", "rows", "emptied"):
            del self.__dict__[name]

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
        if self._parameters["weight"] is None:
            if self.out_features == self.pack.shape[0]:
                return kernels.linear_packed(x, self.pack, self.bias)
            if torch.compiler.is_compiling():  # where nothing can be unpacked
                y = kernels.linear_packed(x, self.pack)[..., self.rows]
                return y if self.bias is None else y + self.bias
        return nn.functional.linear(x, self.weight, self.bias)

    def _dense(self) -> Tensor:
        dense = self.pack.dense()
        return dense if dense.shape[0] == self.out_features else dense[self.rows].clone()

    def _apply(self, fn: Callable, recurse: bool = True) -> "PackedLinear":
        probe = fn(torch.empty(0, dtype=self.pack.dtype))
        if probe.dtype != self.pack.dtype or probe.device.type != "cpu":
            self.unpack()
        return nn.Linear._apply(self, fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._parameters["weight"] is None:
            destination[prefix + "weight"] = self._dense()
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
        emptied = [state.pop(name) for name in ("pack", "rows", "emptied")][-1]
        if self._parameters["weight"] is None:
            weight = nn.Parameter(self._dense(), emptied.requires_grad)
            state["_parameters"]["weight"] = weight
        return object.__new__, (nn.Linear,), state


def unpack(linears: list[Any]) -> None:
    """Makes those that are packed ordinary again."""
    for linear in linears:
        if type(linear) is PackedLinear:
            linear.unpack()


def pack_of(linears: list[Any]) -> kernels.PackedWeight | None:
    """The pack whose rows are the weights of all these and of no others, if there is one."""
    if any(type(n) is not PackedLinear or n._parameters["weight"] is not None for n in linears):
        return None
    pack, rows = linears[0].pack, sum(linear.out_features for linear in linears)
    same = rows == pack.shape[0] and all(linear.pack is pack for linear in linears)
    return pack if same else None
