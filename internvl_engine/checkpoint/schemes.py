"""Quantization as checkpoints see it: what asks for it, and what knows how.

    "quantization_config": {"quant_method": "internvl_engine", "version": 1, "scheme": "int8", ...}

The forms of weights, and which weight gets which, lie above this room: the package hands them in
(`provide`, in internvl_engine/__init__.py). This file imports neither torch nor them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

METHOD = "internvl_engine"
VERSION = 1  # of the layouts of what is stored
FIELD = "quantization_config"
Layout = Mapping[str, "tuple[tuple[int, ...], torch.dtype]"]  # of inner tensors, the packed first


class Scheme(Protocol):
    """Which weights of a model are held in which form."""

    def settings(self) -> dict[str, Any]:
        """What makes this scheme again, as JSON: {"scheme": "int8", ...}."""

    def layout(self, name: str, shape: tuple[int, ...]) -> Layout | None:
        """The shapes and dtypes of a weight's inner tensors; None where it stays wide.

        Args:
            name: of the parameter in its model.
        """

    def quantize(self, name: str, weight: "Tensor") -> "Tensor":
        """A weight in its form; the very weight where it stays wide."""


class Forms(Protocol):
    """What knows the forms of weights."""

    def scheme(self, settings: Mapping[str, Any]) -> Scheme:
        """The scheme of some settings.

        Raises:
            ValueError, TypeError: there is none.
        """

    def assemble(
        self, inner: "Mapping[str, Tensor]", shape: tuple[int, ...], dtype: "torch.dtype"
    ) -> "Tensor":
        """The weight that inner tensors are, mapped ones or on the meta device too.

        Raises:
            ValueError: they are no weight of that shape in any form.
        """

    def inner(self, weight: "Tensor") -> "Mapping[str, Tensor]":
        """The inner tensors of a weight in a form, by name."""

    def put(self, module: "nn.Module", name: str, weight: "Tensor") -> object:
        """Makes a weight in a form a parameter of a module."""


_LOAD: list[Callable[[], Forms]] = []


def provide(load: Callable[[], Forms]) -> None:
    """Says what knows the forms; it is loaded at the first use."""
    _LOAD[:] = [load]


def forms() -> Forms:
    """What knows the forms of weights."""
    assert _LOAD, "internvl_engine/__init__.py provides it"
    return _LOAD[0]()


def find_scheme(scheme: "str | Scheme") -> Scheme:
    """A scheme by its name.

    Raises:
        ValueError: there is none of that name.
    """
    return forms().scheme({"scheme": scheme}) if isinstance(scheme, str) else scheme


def stated(scheme: Scheme, dtype: str) -> dict[str, Any]:
    """The quantization_config of a checkpoint.

    Args:
        dtype: name of that of the weights before.
    """
    return {"quant_method": METHOD, "version": VERSION, **scheme.settings(), "dtype": dtype}


def own_settings(values: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The quantization_config of a config.json where it is one of ours, else None."""
    found = (values or {}).get(FIELD)
    is_ours = isinstance(found, dict) and found.get("quant_method") == METHOD
    return found if is_ours else None


def stored_scheme(settings: Mapping[str, Any], place: Path) -> Scheme:
    """The scheme of a checkpoint.

    Args:
        settings: its quantization_config.
        place: what messages call the file.

    Raises:
        CheckpointError: another version wrote it, or it names no scheme that is known.
    """
    version = settings.get("version")
    if version != VERSION:
        raise CheckpointError(
            f"{place}: its quantized weights are of layout {version!r}, this internvl_engine reads "
            f"layout {VERSION}: quantize the checkpoint that it was made from again (`internvl "
            "convert --quantize`)"
        )
    own = {k: v for k, v in settings.items() if k not in ("quant_method", "version", "dtype")}
    try:
        return forms().scheme(own)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{place}: its {FIELD} is not one of ours ({error})") from error
