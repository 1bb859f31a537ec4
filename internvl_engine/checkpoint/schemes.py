"""Quantization as checkpoints see it: a scheme, and the settings in config.json that name one.

    "quantization_config": {"quant_method": "internvl_engine", "version": 1, "scheme": "int8", ...}

The schemes themselves lie above this room, beside the forms of weights: the package hands them in
(`provide`, in internvl_engine/__init__.py). This file imports neither torch nor them.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

METHOD = "internvl_engine"
VERSION = 1  # of the layouts of what is stored
FIELD = "quantization_config"


class Scheme(Protocol):
    """Which weights of a model are held in which form."""

    def settings(self) -> dict[str, Any]:
        """What makes this scheme again, as JSON: {"scheme": "int8", ...}."""

    def quantize(self, name: str, weight: "Tensor") -> "Tensor":
        """A weight in its form; the very weight where it stays wide.

        Args:
            name: of the parameter in its model.
            weight: plain; on the meta device where the shapes of the inner tensors are all.
        """

    def form(self, packed: "torch.dtype") -> "Callable[[Tensor], Tensor]":
        """What quantizes any weight into the form whose first inner tensor is of a dtype.

        Raises:
            ValueError: there is no such form.
        """


Find = Callable[[Mapping[str, Any]], Scheme]
_FIND: list[Find] = []


def provide(find: Find) -> None:
    """Says how settings become a scheme."""
    _FIND[:] = [find]


def find_scheme(settings: str | Mapping[str, Any]) -> Scheme:
    """A scheme by its name or its settings.

    Raises:
        ValueError: there is none of that name.
    """
    assert _FIND, "internvl_engine/__init__.py provides schemes"
    return _FIND[0]({"scheme": settings} if isinstance(settings, str) else settings)


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
        return find_scheme(own)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{place}: its {FIELD} is not one of ours ({error})") from error
