"""What every fused module is: the eager module itself, with another forward.

The object stays and its class changes to one that derives from the fused class and from its own, as
PyTorch's `fully_shard` does it. So parameters, submodules, hooks, whoever holds the module and code
that looks for layers by class find what they did; `super().forward` is the eager computation; and
going back is to set the class again.
"""

from collections.abc import Callable
from functools import cache, partial
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..weights import Linears, WeightTensor, find_linear, is_hooked

# Of norms and activations: what their class leaves open.
SETTINGS = ("approximate", "variance_epsilon", "eps")


class FusedModule(nn.Module):
    """Base of the fused classes. A module becomes one by `fuse` and itself again by `restore`.

    A fused class says what it `matches`, and gives `compute` with the arguments of the eager
    `forward`, which runs in its place where the module was changed or is watched, and where
    `compute` returns NotImplemented.
    """

    # Names of the groups of linears below the module that become one product each.
    LINEARS: dict[str, tuple[str, ...]] = {}
    # Submodules that `forward` computes without calling them: another class there goes to eager.
    COMPUTED: tuple[str, ...] = ()
    # The method that `accelerate(compile=True)` compiles: of values only, without a look at hooks.
    COMPILED = "compute"
    eager_class: Any
    fused_class: Any
    _fusion: "Fusion"

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """The eager module's own attributes, whatever its class."""

    @classmethod
    def fuse(cls, module: Any, inference: bool = True, tied: frozenset[int] = frozenset()) -> None:
        """Turns an eager module into a fused one, in place.

        Args:
            module: what `matches` and has no `unsupported_reason`.
            inference: whether weights may be merged and packed while the module is not training.
            tied: ids of parameters that several modules use.
        """
        vars(module).pop("forward", None)  # of its class: see has_own_forward
        classes: Any = cls, type(module)
        module.__class__ = _derived(*classes)
        module._fusion = Fusion(module, inference, tied)
        module.prepare()

    @classmethod
    def matches(cls, module: Any) -> bool:
        """Whether the module has the parameters and submodules that this class knows."""
        raise NotImplementedError

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        """Why a module that matches must stay eager, or None."""
        return None

    @classmethod
    def facts(cls, eager: Any) -> dict[str, Any]:
        """What else the class of the fused modules of an eager class holds: read once, not at every
        call."""
        return {}

    @classmethod
    def example_inputs(cls, module: Any, draw: Callable[..., Tensor]) -> tuple:
        """Arguments of `forward` to compare both computations with, by draw(*shape)."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The eager module's result."""
        found = NotImplemented
        if not (self.stays_eager or is_for_onnx()):
            found = self.run("compute", *args, **kwargs)
        return super().forward(*args, **kwargs) if found is NotImplemented else found

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        """What the eager `forward` computes, on the fused operators."""
        raise NotImplementedError

    def run(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a method, compiled where that was asked for."""
        compiled = self._fusion.compiled if name == self.COMPILED else None
        return (compiled or getattr(self, name))(*args, **kwargs)

    def compile_fused(self, **options: Any) -> None:
        """Compiles what the module computes, with the options of `torch.compile`."""
        method = getattr(self, self.COMPILED)
        if hasattr(self, "layer_idx"):
            method = _own_code(method)
        self._fusion.compiled = torch.compile(method, **options)

    def product(self, group: str) -> Callable[..., Tensor]:
        """The linears of a group as one product; see `Linears.__call__`."""
        return partial(self._fusion.linears[group], self)

    def parts_of(self, group: str) -> Any:
        """The linears of a group as parts of one weight, or None; see `Linears.parts`."""
        return self._fusion.linears[group].parts(self)

    def prepare(self) -> None:
        """Gives the weights their form: packed or merged for inference, while it does not train."""
        for linears in self._fusion.linears.values():
            if self._fusion.inference and not self.training:
                linears.prepare(self)
            else:
                linears.restore(self)

    def set_inference(self, inference: bool) -> bool:
        """Changes what the module is fused for; whether that is a change."""
        before, self._fusion.inference = self._fusion.inference, inference
        self.prepare()
        return before != inference

    def restore(self) -> None:
        """Makes it the eager module again, with plain weights in storage of their own."""
        if "eager_class" not in vars(type(self)):
            raise ValueError(
                f"undo: the class of a fused {self.eager_class.__name__} was changed since, to "
                f"{type(self).__name__}; take that back first"
            )
        self._make_plain()
        self._fusion.after_load.remove()
        del self._fusion
        self.__class__ = self.eager_class

    def _make_plain(self) -> None:
        for linears in self._fusion.linears.values():
            linears.restore(self, replace=True)

    def train(self, mode: bool = True) -> Any:
        """Weights are packed in evaluation only."""
        super().train(mode)
        self.prepare()
        return self

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        weights = (p for p in self.parameters() if isinstance(p, WeightTensor))
        packed = next((weight for weight in weights if weight.is_reversible), None)
        if packed is not None:
            probe = fn(torch.empty(0, dtype=packed.dtype, device=packed.device))
            if (probe.dtype, probe.device) != (packed.dtype, packed.device):
                self._make_plain()
        super()._apply(fn, recurse)
        self.prepare()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As ever: plain tensors, of which only tied ones share memory."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for name, _ in self.named_parameters(remove_duplicate=False):
            value = state.get(prefix + name)
            if isinstance(value, WeightTensor) and not isinstance(value, nn.Parameter):
                state[prefix + name] = value.dense()
            elif type(value) is Tensor and self._fusion.shares(value):  # no Parameter: keep_vars
                state[prefix + name] = value.clone()
        return state

    def called(self) -> list[str]:
        """Linears that are called as the modules they are, and why."""
        groups = self._fusion.linears.values()
        return [each for linears in groups for each in linears.called(self)]

    @property
    def stays_eager(self) -> bool:
        """Whether the eager module must compute this call: it drops, or was changed or hooked."""
        parts = self.parts()
        watched = any(map(is_hooked, parts)) or any(map(is_hooked, self._fusion.left_out))
        changed = self._fusion.contract != contract(self, parts)
        return watched or changed or self.training and self.drops()

    def parts(self) -> list[nn.Module]:
        """The submodules that are computed without being called."""
        found = (submodule(self, name) for name in self.COMPUTED)
        return [part for part in found if part is not None]

    def drops(self) -> bool:
        """Whether dropout changes an output while training."""
        return any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.modules())

    def _get_name(self) -> str:
        return self.fused_class.__name__

    def extra_repr(self) -> str:
        return f"in place of {type(self).__name__}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.prepare()

    def __reduce_ex__(self, protocol: Any) -> tuple:  # its class is made anew where it is read
        return _blank, (self.fused_class, self.eager_class), self.__dict__


class Fusion:
    """What a fused module keeps beside the attributes of the eager one."""

    def __init__(self, module: FusedModule, inference: bool, tied: frozenset[int]) -> None:
        self.inference = inference
        self.linears = {
            group: Linears(*names, tied=tied)
            for group, names in type(module).LINEARS.items()
            if all(find_linear(module, name) is not None for name in names)
        }
        parts = module.parts()
        self.contract = contract(module, parts)
        # What `compute` leaves out, as dropout, and may be hooked. (Linears look for themselves.)
        self.left_out = tuple(
            inner
            for inner in module.modules()
            if inner is not module and inner not in parts and not isinstance(inner, nn.Linear)
        )
        self.compiled: Callable | None = None
        self.after_load = module.register_load_state_dict_post_hook(_prepare)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "compiled": None}

    def shares(self, value: Tensor) -> bool:
        """Whether a tensor lies in the storage of merged weights."""
        return any(linears.shares(value) for linears in self.linears.values())


def contract(module: FusedModule, parts: list[nn.Module]) -> list:
    """What a fused computation relies on: the classes, forwards and settings of its parts."""
    kinds = [vars(type(part)).get("eager_class", type(part)) for part in parts]
    return [
        module.eager_class.forward,
        *(
            (kind, kind.forward, *map(vars(part).get, SETTINGS))
            for kind, part in zip(kinds, parts, strict=True)
        ),
    ]


def is_for_onnx() -> bool:
    """Whether this call is traced for ONNX, which knows no operators of ours."""
    tracing = torch.compiler.is_exporting() or torch.jit.is_tracing()
    return tracing and torch.onnx.is_in_onnx_export()


def _own_code(method: Any) -> Any:
    """The same method with a code object of its own.

    Layers that write to a cache differ in their index, which becomes part of their graphs, and
    PyTorch (2.13) compiles one code object eight times at most.
    """
    of = method.__func__
    own = FunctionType(
        of.__code__.replace(), of.__globals__, of.__name__, of.__defaults__, of.__closure__
    )
    own.__kwdefaults__ = of.__kwdefaults__
    return MethodType(own, method.__self__)


@cache
def _derived(fused: Any, eager: Any) -> Any:
    """The class of fused modules of an eager class, by whose name others still find it."""
    namespace = {
        "__module__": eager.__module__,
        "__qualname__": eager.__qualname__,
        "__doc__": fused.__doc__,
        "fused_class": fused,
        "eager_class": eager,
        **fused.facts(eager),
    }
    return type(eager)(eager.__name__, (fused, eager), namespace)


def _blank(fused: type, eager: type) -> Any:
    return object.__new__(_derived(fused, eager))


def submodule(module: Any, path: str) -> Any:
    """The submodule of a dotted name, or None."""
    for name in path.split("."):
        module = None if module is None else module._modules.get(name)
    return module


def holds(module: Any, *names: str) -> bool:
    """Whether a module has submodules, parameters or attributes of these names.

    Its own: a wrapper (torch.compile's, a checkpointing one) passes on those of what it wraps.
    """
    places = (getattr(module, place, {}) for place in ("_modules", "_parameters", "__dict__"))
    return isinstance(module, nn.Module) and set(names) <= set().union(*places)


def _prepare(module: Any, incompatible_keys: object) -> None:
    """Merges and packs what was loaded: compiled code cannot."""
    module.prepare()
