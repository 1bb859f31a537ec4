"""Linear layers of a fused module: merged with their neighbours, packed, or simply called.

Every weight exists once and belongs to its Linear, in one of three forms:

    merged   the parameters of q, k, v (or gate, up) are views of one storage, the product's weight
    packed   the Linear has become a `PackedLinear`: its weight is rows of a pack, the CPU's layout.
             Whoever asks for `weight` finds an ordinary Linear with its own parameter again
    as it is where somebody else holds the parameter too: a tied weight, an optimizer, a caller

Biases stay where they are and are looked up at every call.
"""

import sys
from inspect import getclosurevars
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdRef

from .. import kernels
from .packed import PackedLinear, is_packed, pack_of, unpack


class Projection:
    """One or several Linear submodules with the same input, as one product.

    Weights are looked up at every call: a Linear that was wrapped (LoRA), quantized or hooked since
    is called as the module it is, and one that was moved or loaded anew is merged or packed again.
    Compiled code does neither: it computes with the form that it finds.
    """

    def __init__(self, owner: Any, *names: str, inference: bool) -> None:
        """names: submodules of owner, in the order of their rows. inference: merge and pack."""
        self.owner = owner
        self.names = names
        self.inference = inference
        self._merged: dict[str, Merged] = {}  # "weight", "bias"

    def __call__(self, x: Tensor, epilogue: str = "none", residual: Tensor | None = None) -> Tensor:
        """residual + epilogue([linear(x), ...]): (..., C) to (..., F)."""
        linears = self.linears()
        weight = None if any(map(is_hooked, linears)) else self._weight_of(linears)
        if isinstance(weight, kernels.PackedWeight):
            return kernels.linear_packed(x, weight, self._bias_of(linears), epilogue, residual)
        if weight is not None:
            return kernels.linear(x, weight, self._bias_of(linears), epilogue, residual)
        outputs = [linear(x) for linear in linears]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return finish(y, epilogue, residual)

    def linears(self) -> list[Any]:
        """The modules as they are now."""
        return [self.owner.get_submodule(name) for name in self.names]

    def set_inference(self, inference: bool) -> None:
        """Whether to merge and pack from now on; where not, every weight is given back."""
        self.inference = inference
        if inference:
            self.prepare()
        else:
            self.release()

    def prepare(self) -> None:
        """Merges or packs what can be, before a call does."""
        linears = self.linears()
        if not any(map(is_hooked, linears)):
            self._weight_of(linears)

    def release(self) -> None:
        """Makes every Linear an ordinary one again, with its own parameter."""
        unpack(self.linears())
        self._merged.clear()

    def _weight_of(self, linears: list[Any]) -> kernels.PackedWeight | Tensor | None:
        """The weight of all rows; None where it is in several tensors, or behind other modules."""
        pack = pack_of(linears)
        if pack is not None:
            return pack
        weight = self._dense_of(linears)
        is_final = weight is not None and len(linears) > 1
        if is_final or not self.inference or torch.compiler.is_compiling():
            return weight
        del weight  # nobody else may hold it
        self._join(linears)
        pack = pack_of(linears)
        return self._dense_of(linears) if pack is None else pack

    def _dense_of(self, linears: list[Any]) -> Tensor | None:
        if all(type(linear) is nn.Linear for linear in linears):
            return self._whole("weight", [linear.weight for linear in linears])
        return None

    def _bias_of(self, linears: list[Any]) -> Tensor | None:
        biases = [linear.bias for linear in linears]
        whole = self._whole("bias", biases)
        there = [bias for bias in biases if bias is not None]
        if whole is not None or not there:
            return whole
        zeros = [there[0].new_zeros(linear.out_features) for linear in linears]
        return torch.cat([z if b is None else b for z, b in zip(zeros, biases, strict=True)])

    def _whole(self, name: str, parameters: list[Any]) -> Tensor | None:
        """One parameter, or several as the one tensor in which they lie below each other."""
        if len(parameters) == 1:
            return parameters[0]
        merged = self._merged.get(name)
        return merged.tensor if merged is not None and merged.holds(parameters) else None

    def _join(self, linears: list[Any]) -> None:
        is_dense = [type(linear) is nn.Linear for linear in linears]
        if not any(is_dense):
            return
        if not all(is_dense):  # somebody asked for one of these weights: pack them together again
            if not all(
                map(is_packed, (n for n, d in zip(linears, is_dense, strict=True) if not d))
            ):
                return
            unpack(linears)
        self._merged.clear()  # it holds the parameters too
        if kernels.can_pack(linears[0].weight):
            self._pack(linears)
        else:
            self._merge("weight", linears)
        self._merge("bias", linears)

    @torch.no_grad()
    def _pack(self, linears: list[Any]) -> None:
        if not _may_join("weight", linears):
            return
        weights = [linear.weight.data for linear in linears]
        pack = kernels.PackedWeight(weights[0] if len(weights) == 1 else torch.cat(weights))
        start = 0
        for linear in linears:
            stop = start + linear.weight.shape[0]
            PackedLinear.pack_into(linear, pack, slice(start, stop))
            start = stop

    @torch.no_grad()
    def _merge(self, name: str, linears: list[Any]) -> None:
        if len(linears) > 1 and _may_join(name, linears):
            self._merged[name] = Merged([getattr(linear, name) for linear in linears])

    def __getstate__(self) -> dict[str, Any]:
        # Copied parameters share no storage: the copy merges its own at its first call.
        return {**self.__dict__, "_merged": {}}


class Merged:
    """Parameters that are views of one tensor, where they lie one below the other."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = tuple(parameters)
        self.tensor = torch.cat([parameter.data for parameter in parameters])
        rows = [parameter.shape[0] for parameter in parameters]
        for parameter, part in zip(parameters, self.tensor.split(rows), strict=True):
            parameter.data = part

    def holds(self, parameters: list[Any]) -> bool:
        """Whether these are they, and still views.

        Compiled code guards which parameters they are. Whether they are views it sees only when it
        is traced: of `parameter.data = ...` after that only an eager call or `prepare` takes note.
        """
        same = all(a is b for a, b in zip(self.parameters, parameters, strict=True))
        return same and _are_parts(self.tensor, *parameters)


@torch.compiler.assume_constant_result
def _are_parts(whole: Tensor, *parts: Tensor) -> bool:
    position = whole.data_ptr()
    for part in parts:
        if part.data_ptr() != position or part.dtype != whole.dtype:
            return False
        position += part.nbytes
    return position == whole.data_ptr() + whole.nbytes


def state_of(linear: Any) -> tuple | None:
    """What changes when the weight or the bias of a linear does; None where it is more than that.

    It can be kept: it keeps no weight alive, and none that is made later is taken for this one.
    """
    packed = is_packed(linear)
    if is_hooked(linear) or not (packed or type(linear) is nn.Linear):
        return None
    weight = (WeakIdRef(linear.packed.pack),) if packed else _state_of_parameter(linear.weight)
    bias = () if linear.bias is None else _state_of_parameter(linear.bias)
    return None if weight is None or bias is None else (weight, bias)


def _state_of_parameter(parameter: Tensor) -> tuple | None:
    version = version_of(parameter)
    return None if version is None else (WeakIdRef(parameter), version)


def version_of(x: Tensor) -> tuple | None:
    """Memory, number of changes and dtype of a tensor: the same means unchanged.

    None where nobody can tell, because a tensor made under `torch.inference_mode` counts none.
    """
    return None if x.is_inference() else (x.data_ptr(), x._version, x.dtype)


def finish(y: Tensor, epilogue: str, residual: Tensor | None) -> Tensor:
    """The epilogue of `linear` on a product that is already there."""
    if epilogue == "gelu":
        y = nn.functional.gelu(y)
    elif epilogue == "swiglu":
        y = kernels.swiglu(y)
    return y if residual is None else residual + y


def is_hooked(module: Any) -> bool:
    """Whether somebody wants to see, or to change, what goes through a module."""
    others = module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if others or has_own_forward(module):
        return True
    hooks = module._forward_hooks
    return bool(hooks) and not all(map(_is_idle, hooks.values()))


def _is_idle(hook: Any) -> bool:
    """Whether a hook is one that transformers 5 leaves on a module once it recorded its output.

    Such a hook does nothing but in a call that is asked for outputs of its kind.
    """
    recording = sys.modules.get("transformers.utils.output_capturing")
    if recording is None or torch.compiler.is_compiling():
        return False
    if getattr(hook, "__module__", None) != recording.__name__:
        return False
    collected = recording._active_collector.get()
    return collected is None or getclosurevars(hook).nonlocals["key"] not in collected


def has_own_forward(module: Any) -> bool:
    """Whether somebody put another forward into the very module, as device hooks do.

    transformers 4 does while it records attentions, and then puts back the one of the class.
    """
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def _may_join(name: str, linears: list[Any]) -> bool:
    """Whether these parameters are of one kind, and nobody but their Linear holds one."""
    if any(_is_shared(linear._parameters, name) for linear in linears):
        return False
    parameters = [linear._parameters[name] for linear in linears]
    kinds = {(p.dtype, p.device, isinstance(p, nn.Parameter)) for p in parameters}
    return len(kinds) == 1 and isinstance(parameters[0], nn.Parameter) and not parameters[0].is_meta


_ALONE = {"parameter": nn.Parameter(torch.empty(0))}


def _is_shared(parameters: dict[str, Any], name: str) -> bool:
    """Whether somebody else holds a parameter too, who would find it emptied or elsewhere.

    He may be no module of the model, so the references are counted, against those of a parameter
    that only a dictionary holds.
    """
    return sys.getrefcount(parameters.get(name)) > sys.getrefcount(_ALONE.get("parameter"))
