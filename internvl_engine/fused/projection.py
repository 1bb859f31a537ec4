"""Linear layers of a fused module: merged with their neighbours, packed, or simply called.

Every weight exists once. Merged weights (q, k, v; gate, up) own the storage and the parameters of
the Linear modules become views of it. A packed weight (the CPU's layout) is the only copy, and
`PackedLinear` stands in its Linear's place and unpacks for whoever asks.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels


class Projection:
    """One or several Linear submodules with the same input, as one product.

    Weights are looked up at every call: a Linear that was wrapped (LoRA), quantized or hooked since
    is called as the module it is, and one that was moved or loaded anew is merged or packed again.
    """

    def __init__(self, owner: Any, *names: str, inference: bool) -> None:
        """names: submodules of owner, in the order of their rows. inference: merge and pack."""
        self.owner = owner
        self.names = names
        self.inference = inference
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None

    def __call__(self, x: Tensor, epilogue: str = "none", residual: Tensor | None = None) -> Tensor:
        """residual + epilogue([linear(x), ...]): (..., C) to (..., F)."""
        linears = self.linears()
        if self.inference:
            linears = self._prepared(linears)
        first = linears[0]
        pack = getattr(first, "pack", None)
        if pack and all(getattr(linear, "pack", None) is pack for linear in linears):
            if not _watched(linears):
                return kernels.linear_packed(x, pack.weight, pack.bias, epilogue, residual)
        if len(linears) == 1 and is_plain(first):
            return kernels.linear(x, first.weight, first.bias, epilogue, residual)
        if self._weight is not None and all(map(is_plain, linears)):
            return kernels.linear(x, self._weight, self._bias, epilogue, residual)
        outputs = [linear(x) for linear in linears]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return finish(y, epilogue, residual)

    def linears(self) -> list[Any]:
        """The modules as they are now."""
        return [self.owner.get_submodule(name) for name in self.names]

    def prepare(self) -> None:
        """Merges or packs what can be."""
        if self.inference:
            self._prepared(self.linears())

    def release(self) -> None:
        """Unpacks into the Linear modules that were there before."""
        for name, linear in zip(self.names, self.linears(), strict=True):
            if isinstance(linear, PackedLinear):
                _replace(self.owner, name, linear.restored())
        self._weight = self._bias = None

    def _prepared(self, linears: list[Any]) -> list[Any]:
        if not all(map(is_plain, linears)):
            if not any(map(is_plain, linears)) or _watched(linears):
                return linears
            for linear in linears:  # somebody unpacked one of them: pack them together again
                if isinstance(linear, PackedLinear):
                    linear.restored()
            if not all(map(is_plain, linears)):
                return linears
        weight = linears[0].weight
        if weight.device.type == "cpu" and kernels.can_pack(weight):
            return self._pack(linears)
        if len(linears) > 1 and not self._is_merged(linears):
            self._merge(linears)
        return linears

    def _is_merged(self, linears: list[Any]) -> bool:
        if self._weight is None or torch.compiler.is_compiling():
            return self._weight is not None
        start, rows = self._weight.data_ptr(), 0
        for linear in linears:
            if linear.weight.data_ptr() != start + rows * self._weight.stride(0) * (
                self._weight.element_size()
            ):
                return False
            rows += linear.weight.shape[0]
        return self._weight.dtype == linears[0].weight.dtype

    @torch.no_grad()
    def _merge(self, linears: list[Any]) -> None:
        self._weight, self._bias = _joined(linears)
        if self._weight is None:
            return
        rows = [linear.weight.shape[0] for linear in linears]
        for linear, part in zip(linears, self._weight.split(rows), strict=True):
            linear.weight.data = part
        if self._bias is not None:
            for linear, part in zip(linears, self._bias.split(rows), strict=True):
                linear.bias.data = part

    @torch.no_grad()
    def _pack(self, linears: list[Any]) -> list[Any]:
        weight, bias = _joined(linears)
        if weight is None:
            return linears
        pack = Pack(kernels.PackedWeight(weight), bias)
        packed: list[Any] = []
        start = 0
        for name, linear in zip(self.names, linears, strict=True):
            if isinstance(linear, PackedLinear):  # was moved or loaded since it was packed
                linear = linear.restored()
            stop = start + linear.weight.shape[0]
            packed.append(PackedLinear(linear, pack, slice(start, stop)))
            _replace(self.owner, name, packed[-1])
            start = stop
        return packed

    def __deepcopy__(self, memo: dict[int, Any]) -> "Projection":
        # Copied parameters share no storage: the copy merges its own at its first call.
        return Projection(deepcopy(self.owner, memo), *self.names, inference=self.inference)


class Pack:
    """A packed weight and its bias, shared by the Linear modules whose rows it holds."""

    def __init__(self, weight: kernels.PackedWeight, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias


class PackedLinear(nn.Linear):
    """Stands in place of a Linear whose weight is rows of a Pack.

    Whoever asks for `weight` (to merge LoRA into it, to change it) gets the Linear's own parameter
    again; the next call of the fused module packs what it finds there.
    """

    def __init__(self, linear: Any, pack: Pack, rows: slice) -> None:
        self.__dict__.update(linear.__dict__)
        self._parameters = dict(linear._parameters)
        self.__dict__["linear"] = linear  # hidden, not a submodule: its names are ours
        self.rows = rows
        self.pack: Pack | None = pack
        del self._parameters["weight"]
        linear.weight.data = linear.weight.data.new_empty(0)

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """The dense parameter (F, C), unpacked for good."""
        self.restored()
        return self._parameters["weight"]

    def forward(self, x: Tensor) -> Tensor:
        """Only when called as a module: wrapped, hooked, or by the eager layer."""
        if self.pack is not None and self.rows == slice(0, self.pack.weight.shape[0]):
            return kernels.linear_packed(x, self.pack.weight, self.bias)
        return nn.functional.linear(x, self.weight, self.bias)

    def restored(self) -> Any:
        """The Linear that was here, with its own weight again."""
        if self.pack is not None:
            linear = self.__dict__["linear"]
            linear.weight.data = self._dense(self.pack)
            self._parameters["weight"] = linear.weight
            self.pack = None
        return self.__dict__["linear"]

    def _dense(self, pack: Pack) -> Tensor:
        dense = pack.weight.dense()
        return dense if dense.shape[0] == self.out_features else dense[self.rows].clone()

    def _apply(self, fn: Callable, recurse: bool = True) -> "PackedLinear":
        if self.pack is not None:
            probe = fn(torch.empty(0, dtype=self.pack.weight.dtype))
            if probe.dtype != self.pack.weight.dtype or probe.device.type != "cpu":
                self.restored()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.pack is not None:
            destination[prefix + "weight"] = self._dense(self.pack)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        if prefix + "weight" in state_dict:
            self.restored()
        super()._load_from_state_dict(state_dict, prefix, *args)


def is_plain(linear: Any) -> bool:
    """Whether a module is nothing but a dense matrix product: its own weight, nobody watching."""
    plain = type(linear) is nn.Linear or isinstance(linear, PackedLinear) and linear.pack is None
    return plain and not _watched([linear])


def state_of(linear: Any) -> tuple | None:
    """What changes when the weight of a linear does; None where it is more than a linear."""
    if isinstance(linear, PackedLinear) and linear.pack is not None:
        return (id(linear.pack),)
    return version_of(linear.weight) if is_plain(linear) else None


def version_of(x: Tensor) -> tuple:
    """Memory, number of changes and dtype of a tensor: the same means unchanged."""
    if torch.compiler.is_compiling() or x.is_inference():  # neither counts changes
        return 0, 0, x.dtype
    return x.data_ptr(), x._version, x.dtype


def finish(y: Tensor, epilogue: str, residual: Tensor | None) -> Tensor:
    """The epilogue of `linear` on a product that is already there."""
    if epilogue == "gelu":
        y = nn.functional.gelu(y)
    elif epilogue == "swiglu":
        y = kernels.swiglu(y)
    return y if residual is None else residual + y


def is_hooked(module: Any) -> bool:
    """Whether somebody wants to see, or to change, what goes through a module."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return bool(hooks) or has_own_forward(module)


def has_own_forward(module: Any) -> bool:
    """Whether somebody put another forward into the very module, as device hooks do.

    transformers 4 does while it records attentions, and then puts back the one of the class.
    """
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def _watched(linears: list[Any]) -> bool:
    return any(map(is_hooked, linears))


def _joined(linears: list[Any]) -> tuple[Tensor | None, Tensor | None]:
    """Weights and biases one below the other, or None where the kinds do not go together."""
    first = linears[0]
    if len(linears) == 1:
        return first.weight.data, None if first.bias is None else first.bias.data
    same = all(
        linear.weight.dtype == first.weight.dtype
        and linear.weight.device == first.weight.device
        and (linear.bias is None) == (first.bias is None)
        for linear in linears
    )
    if not same or first.weight.is_meta:
        return None, None
    weight = torch.cat([linear.weight.data for linear in linears])
    if first.bias is None:
        return weight, None
    return weight, torch.cat([linear.bias.data for linear in linears])


def _replace(owner: Any, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(owner.get_submodule(parent), attribute, module)
