"""What every fused module is: the eager one's state with another forward."""

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .projection import Projection, is_hooked

# What others set on a layer while it is fused, and the eager module has when it is back.
SWITCHES = ("_is_full_backward_hook", "gradient_checkpointing", "_gradient_checkpointing_func")


class FusedModule(nn.Module):
    """Stands in for an eager module and shares its parameters, submodules, hooks and attributes.

    The dictionaries themselves are shared, so that whatever is loaded, moved, wrapped or hooked on
    either is so on both, `state_dict()` has the old names, and `eager` needs no repair to go back.
    It is of the eager class too, which follows in the order of its bases: transformers looks for
    layers whose states it returns or recomputes by their class, and others wrap layers by theirs.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """The eager module's own attributes, whatever its class."""

    def __new__(cls, eager: Any, inference: bool) -> Any:
        return _blank(cls, type(eager))

    def __init__(self, eager: Any, inference: bool) -> None:
        """inference: whether weights may be merged and packed, and are constants."""
        self.__dict__.update(eager.__dict__)
        self.__dict__.pop("forward", None)  # of its class: see has_own_forward
        self.__dict__["eager"] = eager  # not a submodule: its names are ours
        self.inference = inference
        self._inner = tuple(module for module in eager.modules() if module is not eager)
        self._drops = any(isinstance(m, nn.Dropout) and m.p > 0 for m in self._inner)
        self._after_load = self.register_load_state_dict_post_hook(_prepare)

    @classmethod
    def claims(cls, module: Any) -> bool:
        """Whether the module has the parameters and submodules that this class knows."""
        raise NotImplementedError

    @classmethod
    def objection(cls, module: Any) -> str | None:
        """Why a module that is claimed must stay eager, or None."""
        return None

    @classmethod
    def trial(cls, module: Any, draw: Callable[..., Tensor]) -> tuple | None:
        """Arguments to try a module with, by draw(*shape); None where its class is proof enough."""
        raise NotImplementedError

    def projections(self) -> list[Projection]:
        """Every group of linears whose weights this module merges or packs."""
        return [value for value in self.__dict__.values() if isinstance(value, Projection)]

    def prepare(self) -> None:
        """Merges and packs the weights now rather than at the first call."""
        for projection in self.projections():
            projection.prepare()

    def release(self) -> Any:
        """Gives every weight back to its Linear and returns the eager module."""
        for projection in self.projections():
            projection.release()
        self._after_load.remove()
        for name in SWITCHES:
            if name in self.__dict__:
                setattr(self.eager, name, self.__dict__[name])
        return self.eager

    def set_inference(self, inference: bool) -> None:
        """Changes for what the module is fused."""
        self.inference = inference
        for projection in self.projections():
            projection.set_inference(inference)

    def train(self, mode: bool = True) -> Any:
        """Both modules, for where the eager one computes; weights are constants only in eval."""
        self.eager.training = mode
        super().train(mode)
        for projection in self.projections():
            projection.set_inference(self.inference and not mode)
        return self

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.prepare()
        return self

    @property
    def is_watched(self) -> bool:
        """Whether somebody hooked a submodule or its forward, so that it must really be called."""
        return any(map(is_hooked, self._inner))

    @property
    def stays_eager(self) -> bool:
        """Whether the eager module must compute this call, because it is watched or drops."""
        return (self.training and self._drops) or self.is_watched

    def extra_repr(self) -> str:
        return f"in place of {type(self.eager).__name__}"

    def __reduce__(self) -> tuple:  # its class is made anew where it is read
        return _blank, (self.fused_class, type(self.eager)), self.__getstate__()


@cache
def _derived(fused: type, eager: type) -> Any:
    """The fused class for modules of an eager class, which is one of its bases."""
    namespace = {"__module__": fused.__module__, "__doc__": fused.__doc__, "fused_class": fused}
    return type(fused)(fused.__name__, (fused, eager), namespace)


def _blank(fused: type, eager: type) -> Any:
    return object.__new__(_derived(fused, eager))


def holds(module: Any, *names: str) -> bool:
    """Whether a module has submodules, parameters or attributes of these names.

    Its own: a wrapper (torch.compile's, a checkpointing one) passes on those of what it wraps.
    """
    places = (getattr(module, place, {}) for place in ("_modules", "_parameters", "__dict__"))
    return isinstance(module, nn.Module) and set(names) <= set().union(*places)


def same_arguments(one: type[nn.Module], other: type[nn.Module]) -> bool:
    """Whether modules of two classes can be called alike; a single argument may have any name."""
    names = [list(signature(each.forward).parameters) for each in (one, other)]
    return names[0] == names[1] or [len(each) for each in names] == [2, 2]


def _prepare(module: Any, incompatible_keys: object) -> None:
    """Merges and packs what was loaded: compiled code cannot."""
    module.prepare()
