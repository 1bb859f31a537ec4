"""What every fused module is: the eager one's state with another forward."""

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .projection import Projection, version_of


class FusedModule(nn.Module):
    """Stands in for an eager module and shares its parameters, submodules, hooks and attributes.

    The dictionaries themselves are shared, so that whatever is loaded, moved, wrapped or hooked on
    either is so on both, `state_dict()` has the old names, and `eager` needs no repair to go back.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """The eager module's own attributes, whatever its class."""

    def __init__(self, eager: Any, inference: bool) -> None:
        """inference: whether weights may be merged and packed, and are constants."""
        self.__dict__.update(eager.__dict__)
        self.__dict__["eager"] = eager  # not a submodule: its names are ours
        self.inference = inference
        self._inner = tuple(module for module in eager.modules() if module is not eager)

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
        self.eager.train(self.training)
        return self.eager

    @property
    def is_watched(self) -> bool:
        """Whether somebody hooked a submodule, so that it must really be called."""
        return any(
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
            for module in self._inner
        )

    def extra_repr(self) -> str:
        return f"in place of {type(self.eager).__name__}"


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
        """False while layers are recomputed in the backward pass, which must see the same work."""
        recomputes = getattr(self.loop, "gradient_checkpointing", False) and self.loop.training
        return not (recomputes and torch.is_grad_enabled())

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
