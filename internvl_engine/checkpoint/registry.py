"""The forms of weights, which lie above this room: the package hands them in.

    provide(...)     in internvl_engine/__init__.py
    forms()          whoever reads or writes weights in a form

This file imports neither torch nor them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Layout = Mapping[str, "tuple[tuple[int, ...], torch.dtype]"]


class Kind(Protocol):
    """One form of a weight (F, C)."""

    def inner_layouts(self, shape: tuple[int, ...]) -> Sequence[Layout]:
        """Those that the inner tensors of such a weight may have."""

    def inner_layout(self, shape: tuple[int, ...], **options: Any) -> Layout:
        """The shapes and dtypes of the inner tensors, the packed one first."""

    def quantize(self, weight: "Tensor", **options: Any) -> Any:
        """A weight in this form; `inner_tensors()` of it are its inner tensors by name."""


class Forms(Protocol):
    """What knows the forms of weights: the room internvl_engine.weights."""

    KINDS: Mapping[str, Kind]

    def assemble(
        self, inner: "Mapping[str, Tensor]", shape: tuple[int, ...], dtype: "torch.dtype"
    ) -> "Tensor":
        """The weight that inner tensors are, mapped ones or on the meta device too.

        Raises:
            ValueError: they are no weight of that shape in any form.
        """

    def put(self, module: "nn.Module", name: str, weight: "Tensor") -> object:
        """Makes a weight in a form a parameter of a module."""


_LOAD: list[Callable[[], Any]] = []


def provide(load: Callable[[], Any]) -> None:
    """Says what knows the forms; it is loaded at the first use."""
    _LOAD[:] = [load]


def forms() -> Forms:
    """What knows the forms of weights."""
    assert _LOAD, "internvl_engine/__init__.py provides it"
    return _LOAD[0]()
