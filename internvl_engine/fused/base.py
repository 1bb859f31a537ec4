"""What every fused module is: the eager one's state with another forward."""

import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .projection import Projection, is_hooked, version_of


class FusedModule(nn.Module):
    """Stands in for an eager module and shares its parameters, submodules, hooks and attributes.

    The dictionaries themselves are shared, so that whatever is loaded, moved, wrapped or hooked on
    either is so on both, `state_dict()` has the old names, and `eager` needs no repair to go back.
    To `isinstance` it is of the eager class too: transformers looks for the layers whose hidden
    states and attentions it returns by their class.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """The eager module's own attributes, whatever its class."""

    else:

        @property
        def __class__(self) -> type:
            return type(self.eager) if "eager" in self.__dict__ else type(self)

    def __init__(self, eager: Any, inference: bool) -> None:
        """inference: whether weights may be merged and packed, and are constants."""
        self.__dict__.update(eager.__dict__)
        self.__dict__.pop("forward", None)  # of its class: see has_own_forward
        self.__dict__["eager"] = eager  # not a submodule: its names are ours
        self.inference = inference
        self._inner = tuple(module for module in eager.modules() if module is not eager)
        self._after_load = self.register_load_state_dict_post_hook(_prepare)

    @classmethod
    def claims(cls, module: Any) -> bool:
        """Whether the module has the parameters and submodules that this class knows."""
        raise NotImplementedError

    @classmethod
    def objection(cls, module: Any) -> str | None:
        """Why a module that is claimed must stay eager, or None."""
        return None

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
        return self.eager

    def set_inference(self, inference: bool) -> None:
        """Changes for what the module is fused."""
        self.inference = inference
        for projection in self.projections():
            projection.set_inference(inference)

    def train(self, mode: bool = True) -> Any:
        """Both modules, for where the eager one computes; weights are constants only in eval."""
        self.eager.training = mode
        nn.Module.train(self, mode)
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

    def _get_name(self) -> str:
        return type(self).__name__

    def extra_repr(self) -> str:
        return f"in place of {type(self.eager).__name__}"

    def __reduce__(self) -> tuple:  # pickle compares __class__ with the type
        return object.__new__, (type(self),), self.__dict__


def _prepare(module: Any, incompatible_keys: object) -> None:
    """Merges and packs what was loaded: compiled code cannot."""
    module.prepare()


class Shared:
    """What all layers would compute of the same tensor: the first does, the others take it.

    A reader that comes again starts anew, as does a tensor that was changed or recorded into a CUDA
    graph: nothing outlives its pass but by the memory it takes, and that goes with the tensor.
    """

    def __init__(self) -> None:
        self._x: weakref.ref[Tensor] | None = None
        self._version: tuple = ()
        self._value: Any = None
        self._readers: set[int] = set()

    def get(self, x: Tensor, compute: Callable[[], Any], reader: object) -> Any:
        """compute(), or what another reader of the very same x made of it in this pass."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # each layer its own graph
            return compute()
        known = self._x is not None and self._x() is x and self._version == version_of(x)
        if not known or id(reader) in self._readers:
            value = compute()
            self._x = weakref.ref(x, self._forget)  # from here on the last tensor's is not heard
            self._value, self._version, self._readers = value, version_of(x), set()
        self._readers.add(id(reader))
        return self._value

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        if self._x is gone:
            self._x = self._value = None

    def __reduce__(self) -> tuple[type["Shared"], tuple]:
        return Shared, ()  # copies and pickles remember nothing


class Handoff:
    """What a layer computed for the next one in the same pass: the norm of the states it returns.

    It is taken only by somebody who holds the very tensor that was returned, unchanged; whoever
    looks in between or changes something loses nothing but the saved pass.
    """

    def __init__(self, norm: Any, loop: Any) -> None:
        """norm: of the next layer. loop: what calls the layers, and may recompute them."""
        self.norm = norm
        self.loop = loop
        self._hidden: torch.Tensor | None = None
        self._normed: torch.Tensor | None = None
        self._version = 0

    @property
    def is_open(self) -> bool:
        """False where layers are recomputed in the backward pass, which must see the same work.

        Without gradients too: transformers 4 runs such layers without, and adds the graph after.
        """
        return not (getattr(self.loop, "gradient_checkpointing", False) and self.loop.training)

    def put(self, hidden: torch.Tensor, normed: torch.Tensor) -> None:
        """Leaves the norm of hidden."""
        self._hidden, self._normed, self._version = hidden, normed, version_of(hidden)[1]

    def take(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """The norm of hidden if that was left, else None; forgets it either way."""
        left, normed, version = self._hidden, self._normed, self._version
        self._hidden = self._normed = None
        return normed if left is hidden and version == version_of(hidden)[1] else None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Handoff":
        return Handoff(deepcopy(self.norm, memo), deepcopy(self.loop, memo))
