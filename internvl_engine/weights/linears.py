"""Linear submodules with the same input as one product, whatever their weights are."""

import sys
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .. import kernels
from ..checkpoint.parts import AbsentModule
from .in_projection import InProjection
from .int4 import Int4Tensor
from .int8 import Int8Tensor
from .merged import Merged, merge
from .packed import PackedTensor
from .quantized import QuantizedTensor
from .tensor import WeightTensor, linear, make_plain

Weights = list[Tensor]
# The second is nn.MultiheadAttention's, and computes what the first does.
LINEARS = (nn.Linear, NonDynamicallyQuantizableLinear)


# One thread at a time changes the forms of weights.
_LOCK = threading.RLock()


class Parts(NamedTuple):
    """A weight as `kernels.norm_linear` takes it, its rows, and a bias or None."""

    weight: tuple[Tensor, ...]
    features: int
    bias: Tensor | None


class Linears:
    """One or several Linear submodules of a module, which every method is given.

    Weights and biases are looked up at every call: what was replaced, wrapped (LoRA), quantized or
    hooked since is called as the module it is, and a weight that is no longer where its neighbours
    are is multiplied with by itself.
    """

    def __init__(self, *names: str, tied: frozenset[int] = frozenset()) -> None:
        """
        Args:
            names: submodules, in the order of their rows.
            tied: ids of parameters that other modules use too, which stay as they are.
        """
        self.names = names
        self.tied = tied
        self._weight: Merged | None = None
        self._bias: Merged | None = None

    def __call__(
        self, owner: nn.Module, x: Tensor, epilogue: str = "none", residual: Tensor | None = None
    ) -> Tensor:
        """residual + epilogue([linear(x), ...]): (..., C) to (..., F)."""
        linears = self.linears(owner)
        if not all(map(is_plain_linear, linears)):
            return self._finish([each(x) for each in linears], epilogue, residual)
        weights, biases = [each.weight for each in linears], [each.bias for each in linears]
        weight = _whole(self._weight, weights)
        if weight is not None:
            return linear(x, weight, _whole_bias(self._bias, biases, weights), epilogue, residual)
        products = [linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
        return self._finish(products, epilogue, residual)

    def parts(self, owner: nn.Module) -> "Parts | None":
        """The weight and bias of all rows for the operators of a decoding step.

        Returns:
            None where the linears are called as modules, their weights are apart, or in a form that
            those operators do not take.
        """
        linears = self.linears(owner)
        if not linears or not all(map(is_plain_linear, linears)):
            return None
        weights, biases = [each.weight for each in linears], [each.bias for each in linears]
        whole = _whole(self._weight, weights)
        held: tuple[Tensor, ...]
        if isinstance(whole, Int8Tensor | Int4Tensor):
            held = tuple(whole.inner_tensors().values())
        elif whole is not None and type(whole) in (Tensor, nn.Parameter):
            held = (whole,)
        else:
            return None
        return Parts(held, whole.shape[0], _whole_bias(self._bias, biases, weights))

    def linears(self, owner: Any) -> list[Any]:
        """The modules as they are now; none where one is gone."""
        found = [find_linear(owner, name) for name in self.names]
        return [] if None in found else found

    def prepare(self, owner: nn.Module) -> None:
        """Packs the weights where the machine has a layout for them, else merges neighbours."""
        linears = self.linears(owner)
        with _LOCK, torch.inference_mode(False):
            if not linears or not all(map(is_plain_linear, linears)):
                self._weight = self._bias = None
                return
            weights, biases = [each.weight for each in linears], [each.bias for each in linears]
            if any(id(each) in self.tied for each in weights):
                return
            quantized = all(isinstance(each, QuantizedTensor) for each in weights)
            packed = all(isinstance(each, PackedTensor) for each in weights)
            if quantized or (
                not packed and (self._weight is None or not self._weight.holds(weights))
            ):
                for each in linears:
                    make_plain(each)
                self._weight = merge([each.weight for each in linears])
            if len(linears) > 1 and not any(bias is None for bias in biases):
                if self._bias is None or not self._bias.holds(biases):
                    self._bias = merge(biases)

    def restore(self, owner: nn.Module, replace: bool = False) -> None:
        """Makes every weight plain, in a storage of its own; see `make_plain`."""
        with _LOCK, torch.inference_mode(False):
            for module in self.linears(owner):
                make_plain(module, replace)
            for merged in (self._weight, self._bias):
                if merged is not None:
                    merged.restore()
            self._weight = self._bias = None

    def called(self, owner: nn.Module) -> list[str]:
        """Linears that must be called as modules for what they or their weights are, and why."""
        found = []
        for name, module in zip(self.names, self.linears(owner), strict=True):
            odd = module.weight if type(module) in (InProjection, *LINEARS) else module
            if odd is module or not _is_plain(odd):
                found.append(f"{name} is called, a {type(odd).__name__}")
        return found

    def shares(self, value: Tensor) -> bool:
        """Whether a tensor lies in the storage of the merged weights or biases."""
        return any(
            merged is not None and merged.shares(value) for merged in (self._weight, self._bias)
        )

    def _finish(self, products: Weights, epilogue: str, residual: Tensor | None) -> Tensor:
        y = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
        return kernels.apply_epilogue(y, epilogue, residual)

    def __getstate__(self) -> dict[str, Any]:
        # Copied parameters share no storage: the copy merges its own.
        return {**self.__dict__, "_weight": None, "_bias": None}


def _whole(merged: Merged | None, parts: Weights) -> Tensor | None:
    """The one tensor of these rows; None where they are apart or each needs its own gradient."""
    if len(parts) == 1:
        return parts[0]
    # Compiled code guards the objects that are compared: it would be compiled for every layer.
    if merged is None or torch.compiler.is_compiling() or not merged.holds(parts):
        return None
    needs_gradient = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
    return None if needs_gradient else merged.whole


def _whole_bias(merged: Merged | None, biases: list[Any], weights: Weights) -> Tensor | None:
    present = [bias for bias in biases if bias is not None]
    if not present:
        return None
    whole = _whole(merged, biases) if len(present) == len(biases) else None
    if whole is not None:
        return whole
    rows = zip(biases, weights, strict=True)
    return torch.cat([present[0].new_zeros(w.shape[0]) if b is None else b for b, w in rows])


def find_linear(owner: Any, path: str) -> Any:
    """The linear of a dotted name below a module as it is now, or None.

    A wrapper passes on what it holds; "in_proj" of an nn.MultiheadAttention is its `InProjection`.
    What was not loaded holds nothing.
    """
    module = owner
    for name in path.split("."):
        if isinstance(module, AbsentModule):
            return None
        inner = module._modules.get(name) or getattr(module, name, None)
        if inner is None and name == "in_proj":
            return InProjection.of(module)
        if not isinstance(inner, nn.Module):
            return None
        module = inner
    return module


def is_plain_linear(module: Any) -> bool:
    """Whether a module is a Linear whose product may be computed without calling it."""
    if type(module) is InProjection:  # whose module is no Linear, and is looked at by its owner
        return _is_plain(module.weight)
    return type(module) in LINEARS and _is_plain(module.weight) and not is_hooked(module)


def _is_plain(weight: Tensor) -> bool:
    """Whether a weight is an ordinary tensor or in one of our forms, and nobody else's subclass."""
    return type(weight) in (nn.Parameter, Tensor) or isinstance(weight, WeightTensor)


def is_hooked(module: Any) -> bool:
    """Whether somebody wants to see, or to change, what goes through a module."""
    others = module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if others or has_own_forward(module) or nn_module._has_any_global_hook():
        return True
    hooks = module._forward_hooks
    return bool(hooks) and not all(map(_is_idle, hooks.values()))


def has_own_forward(module: Any) -> bool:
    """Whether somebody put another forward into the very module, as device hooks do.

    transformers 4 does while it records attentions, and then puts back the one of the class.
    """
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def _is_idle(hook: Any) -> bool:
    """Whether a hook is one that transformers 5 leaves on a module once it recorded attentions,
    and nobody asks for them now."""
    recording = sys.modules.get("transformers.utils.output_capturing")
    if recording is None or torch.compiler.is_compiling():
        return False
    if getattr(hook, "__module__", None) != recording.__name__:
        return False
    return "attentions" not in (recording._active_collector.get() or ())
