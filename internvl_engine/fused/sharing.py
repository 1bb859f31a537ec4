"""What fused modules leave for each other in one pass, and how they know that it is still right.

All of it is one tuple, read at once and written at once, so that threads which call one model
together at worst compute what another has overwritten. A change in place is seen by autograd's
count of changes; edits through `.data` are not counted, and nobody can see those.
"""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .projection import version_of

Result = TypeVar("Result")


def counted(compute: Callable[..., Result], *args: Any) -> Result:
    """compute(*args) without gradients, in tensors that count their changes in any mode.

    Those that are made under `torch.inference_mode` do not, and so could not be left to anybody.
    """
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return compute(*args)
    with torch.inference_mode(False), torch.no_grad():
        return compute(*args)


class Shared:
    """What all layers would compute of the same tensor: the first does, the others take it.

    A reader that comes again starts anew, as does a tensor that was changed or recorded into a CUDA
    graph: nothing outlives its pass but by the memory it takes, and that goes with the tensor.
    """

    def __init__(self) -> None:
        self._known: tuple[weakref.ref[Tensor], tuple, Any, set[int]] | None = None

    def get(self, x: Tensor, compute: Callable[[], Any], reader: object) -> Any:
        """compute(), or what another reader of the very same x made of it in this pass."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # each layer its own graph
            return compute()
        version = version_of(x)
        if version is None:
            return compute()
        known = self._known
        if known is not None:
            whose, its_version, value, readers = known
            if whose() is x and its_version == version and id(reader) not in readers:
                readers.add(id(reader))
                return value
        value = compute()
        # From here on the last tensor's end is not heard.
        self._known = weakref.ref(x, self._forget), version, value, {id(reader)}
        return value

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        known = self._known
        if known is not None and known[0] is gone:
            self._known = None

    def __reduce__(self) -> tuple[type["Shared"], tuple]:
        return Shared, ()  # copies and pickles remember nothing


class Handoff:
    """What a layer computed for the next one in the same pass: the norm of the states it returns.

    It is taken only by somebody who holds the very tensor that was returned, unchanged; whoever
    looks in between or changes something loses nothing but the saved pass. With gradients nothing
    is handed on: a layer may be recomputed alone then, and must do the same work. Nor in compiled
    code, which asks for no counts of changes.
    """

    def __init__(self, norm: Any) -> None:
        """norm: of the next layer."""
        self.norm = norm
        self._left: tuple[Tensor, Tensor, int] | None = None

    @property
    def is_open(self) -> bool:
        """Whether a norm can be left now."""
        return not (torch.is_grad_enabled() or torch.compiler.is_compiling())

    def put(self, hidden: Tensor, normed: Tensor) -> None:
        """Leaves the norm of hidden, which is `counted`."""
        self._left = hidden, normed, hidden._version

    def take(self, hidden: Tensor) -> Tensor | None:
        """The norm of hidden if that was left, else None; forgets it either way."""
        left, self._left = self._left, None
        if left is None or left[0] is not hidden or not self.is_open:
            return None
        return left[1] if left[2] == hidden._version else None

    def __reduce__(self) -> tuple[type["Handoff"], tuple]:
        return Handoff, (self.norm,)  # copies and pickles hold nothing of a pass
