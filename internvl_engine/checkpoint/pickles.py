"""PyTorch's own weight files: .pth, .pt, .bin, .ckpt. Nothing in them is executed."""

import pickle
import re
import zipfile
from collections.abc import KeysView
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError, listed

# Where trainers keep the state dict, the most telling name first: Lightning and many scripts,
# DeepSpeed, scripts.
_KEYS = ("state_dict", "model_state_dict", "module", "model", "weights")


class TorchFile:
    """A file of `torch.save`, read with `weights_only`: tensors, and plain values around them.

    Files older than PyTorch 1.6 cannot be mapped and are read whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            loaded = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
            raise CheckpointError(_explanation(path, str(error))) from error
        self._tensors = {str(name): tensor for name, tensor in _state(loaded, path).items()}

    def names(self) -> KeysView[str]:
        return self._tensors.keys()

    def describe(self, name: str) -> tuple[tuple[int, ...], Any]:
        tensor = self._tensors[name]
        return tuple(tensor.shape), tensor.dtype

    def read(self, name: str) -> Tensor:
        return self._tensors[name].contiguous()


def _explanation(path: Path, error: str) -> str:
    if others := _other_objects(path, error):
        return (
            f"{path}: a pickle that holds other objects than tensors ({listed(others)}). Reading "
            "them would run code of the file, so nothing of it was read. Where you trust it, save "
            "the weights alone: torch.save(model.state_dict(), ...)"
        )
    reason = error.strip().split("\n")[0]
    if "unable to mmap" in reason:
        return (
            f"{path}: too large to be mapped here ({reason}). Convert it to safetensors on a "
            "machine with more memory (`internvl convert`), or allow overcommitting"
        )
    return (
        f"{path}: not a complete file of tensors ({reason}); it has {path.stat().st_size:,} "
        "bytes. Download it again"
    )


def _other_objects(path: Path, error: str) -> list[str]:
    """The classes and functions that `weights_only` refused, by their full names."""
    named = re.findall(r"(?:GLOBAL|global:?|class|type) ([A-Za-z_][\w.]*\.\w+)", error)
    if not named or not zipfile.is_zipfile(path):
        return named
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError):
        return named


def _state(loaded: Any, path: Path) -> dict[Any, Tensor]:
    """The state dict, out of what a trainer may have wrapped it in.

    Raises:
        CheckpointError: there is none, or several and no name that tells which is the model's.
    """
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: needed a dict of tensors, got {type(loaded).__name__}")
    found = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    nested = {name: value for name, value in loaded.items() if _holds_tensors(value)}
    key = next((key for key in _KEYS if key in nested), None)
    if key is None and not found and len(nested) == 1:
        key = next(iter(nested))
    if key is not None:
        return _state(nested[key], path)
    if not found and nested:
        raise CheckpointError(
            f"{path}: which of these is the model? {listed(map(str, nested))} hold tensors; save "
            "the one alone, as state_dict"
        )
    if not found:
        keys = f", only {listed(map(str, loaded))}" if loaded else ""
        raise CheckpointError(f"{path}: needed a dict of tensors, it holds none{keys}")
    return found


def _holds_tensors(value: Any) -> bool:
    """Whether a value is a state dict, or wraps one; an optimizer's state is deeper down."""
    return isinstance(value, dict) and any(
        isinstance(inner, Tensor) or (name in _KEYS and _holds_tensors(inner))
        for name, inner in value.items()
    )
