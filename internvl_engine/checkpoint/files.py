"""Weight files, read by header first and by tensor later, from memory-mapped pages.

A tensor that comes out of `read` is a private mapping of the file: it occupies no memory of its
own until it is written to, and writing never reaches the file. The file must not be overwritten in
place while tensors of it are in use (replace it by renaming instead, as safetensors does).
"""

import json
import math
import mmap
import pickle
import sys
import zipfile
from collections.abc import Iterator, KeysView
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError, CheckpointNotFoundError

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# Writable pages are accounted for when they are written; Python knows the name from 3.13 on.
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_NESTED = ("module", "model", "state_dict")  # what trainers wrap a state dict in


class WeightFile(Protocol):
    """One file of tensors."""

    path: Path

    def names(self) -> KeysView[str]:
        """The names of its tensors."""

    def describe(self, name: str) -> tuple[tuple[int, ...], Any]:
        """Shape, and dtype (or its name where torch has none of that name), of one tensor."""

    def read(self, name: str) -> Tensor:
        """One tensor, mapped where the format allows."""


def size_of(file: WeightFile, name: str) -> int:
    """The bytes of one tensor."""
    shape, dtype = file.describe(name)
    return math.prod(shape) * dtype.itemsize


def open_weights(path: Path) -> WeightFile:
    """Opens a file by its contents' format, which its ending tells.

    Raises:
        CheckpointNotFoundError: the file is not there.
        CheckpointError: it is truncated, corrupt or of another format.
    """
    if not path.is_file():
        raise CheckpointNotFoundError(f"{path}: this weight file of the checkpoint is missing")
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


class SafetensorsFile:
    """A .safetensors file. The library checks the header; the mapping is ours.

    The library's own mapping for torch reserves memory for the whole file, which the kernel refuses
    for a file larger than the memory (the 27 GB of the 14B in one file, on a machine of 24 GB).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._header = safe_open(str(path), framework="numpy")
            self._names = dict.fromkeys(self._header.keys())
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: not a complete safetensors file ({error}); it has "
                f"{path.stat().st_size:,} bytes. Download or copy it again"
            ) from error
        self._map: mmap.mmap | None = None
        self._starts: dict[str, int] = {}

    def names(self) -> KeysView[str]:
        return self._names.keys()

    def describe(self, name: str) -> tuple[tuple[int, ...], Any]:
        view = self._header.get_slice(name)
        kind = view.get_dtype()
        return tuple(view.get_shape()), SAFETENSORS_DTYPES.get(kind, kind)

    def read(self, name: str) -> Tensor:
        if self._map is None:
            self._map, self._starts = _map(self.path)
        shape, dtype = self.describe(name)
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        tensor = torch.frombuffer(
            self._map, dtype=dtype, count=count, offset=self._starts[name]
        ).view(shape)
        # Foreign writers may not align their data, and vector loads need it.
        return tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()


def _map(path: Path) -> tuple[mmap.mmap, dict[str, int]]:
    """The file, mapped privately, and the place of every tensor in it, in bytes."""
    with path.open("rb") as file:
        if hasattr(mmap, "MAP_PRIVATE"):
            mapped = mmap.mmap(
                file.fileno(), 0, mmap.MAP_PRIVATE | NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            )
        else:  # Windows
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    size = int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8 : 8 + size])
    return mapped, {
        name: 8 + size + entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }


class TorchFile:
    """A .pth, .pt or .bin file: tensors alone, no code is run (`weights_only`).

    Files older than PyTorch 1.6 cannot be mapped and are read whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            loaded = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
            reason = str(error).strip().split("\n")[0]
            if "unable to mmap" in reason:
                raise CheckpointError(
                    f"{path}: too large to be mapped here ({reason}). Convert it to safetensors on "
                    "a machine with more memory (`internvl convert`), or allow overcommitting"
                ) from error
            raise CheckpointError(
                f"{path}: not a complete file of tensors ({reason}); it has "
                f"{path.stat().st_size:,} bytes. Download it again, or, where it holds other "
                "objects than tensors, save its state dict as safetensors"
            ) from error
        self._tensors = dict(_tensors(loaded, path))

    def names(self) -> KeysView[str]:
        return self._tensors.keys()

    def describe(self, name: str) -> tuple[tuple[int, ...], Any]:
        tensor = self._tensors[name]
        return tuple(tensor.shape), tensor.dtype

    def read(self, name: str) -> Tensor:
        return self._tensors[name].contiguous()


def _tensors(loaded: Any, path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state dict, out of what a trainer may have wrapped it in."""
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: needed a dict of tensors, got {type(loaded).__name__}")
    for key in _NESTED:
        if isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    found = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    if not found:
        raise CheckpointError(f"{path}: needed a dict of tensors, it holds none")
    yield from found.items()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint.

    Raises:
        CheckpointNotFoundError: the file is not there.
        CheckpointError: it is not JSON, or not an object.
    """
    if not path.is_file():
        raise CheckpointNotFoundError(f"{path}: this file of the checkpoint is missing")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON and of UTF-8
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: needed a JSON object, got {type(value).__name__}")
    return value
