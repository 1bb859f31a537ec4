"""Weight files, read by header first and by tensor later, from memory-mapped pages.

A tensor that comes out of `read` is a private mapping of the file: it occupies no memory of its
own until it is written to, and writing never reaches the file. The file must not be overwritten in
place while tensors of it are in use (replace it by renaming instead, as safetensors does).
"""

import json
import math
import mmap
import sys
import zipfile
from collections.abc import KeysView
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError, CheckpointNotFoundError
from .pickles import TorchFile

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
# Writable pages are accounted for when they are written; Python knows the name from 3.13 on.
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
# How every file of https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md begins.
_POINTER = b"version https://git-lfs.github.com/spec/"


class WeightFile(Protocol):
    """One file of tensors."""

    path: Path

    def names(self) -> KeysView[str]:
        """The names of its tensors."""

    def describe(self, name: str) -> tuple[tuple[int, ...], Any]:
        """Shape, and dtype (or its name where torch has none of that name), of one tensor."""

    def read(self, name: str) -> Tensor:
        """One tensor, mapped where the format allows."""


def refuse_pointer(path: Path) -> None:
    """Raises where a file is what git leaves in place of a large one.

    Raises:
        CheckpointError: it is a Git-LFS pointer.
    """
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(
                f"{path}: a Git-LFS pointer, not the file itself, because the repository was "
                f"cloned without git-lfs. Run `git lfs pull` in {path.parent}, or download the "
                "checkpoint with `hf download`"
            )


def size_of(file: WeightFile, name: str) -> int:
    """The bytes of one tensor."""
    shape, dtype = file.describe(name)
    return math.prod(shape) * dtype.itemsize


def open_weights(path: Path) -> WeightFile:
    """Opens a file by its contents' format, which its ending tells, or its beginning.

    Raises:
        CheckpointNotFoundError: the file is not there.
        CheckpointError: it is truncated, corrupt or of another format.
    """
    if not path.is_file():
        raise CheckpointNotFoundError(f"{path}: this weight file of the checkpoint is missing")
    refuse_pointer(path)
    if path.suffix == ".safetensors" and zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: one of PyTorch's own files; rename it to end in .bin")
    if path.suffix == ".safetensors" or _has_safetensors_header(path):
        return SafetensorsFile(path)
    return TorchFile(path)


def _has_safetensors_header(path: Path) -> bool:
    """Whether a file begins with the length of a JSON object and one."""
    with path.open("rb") as file:
        length, start = int.from_bytes(file.read(8), "little"), file.read(1)
    return start == b"{" and 8 + length <= path.stat().st_size


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
        self._runs: dict[tuple[str, ...], Tensor] = {}  # their bytes

    def names(self) -> KeysView[str]:
        return self._names.keys()

    def describe(self, name: str) -> tuple[tuple[int, ...], Any]:
        view = self._header.get_slice(name)
        kind = view.get_dtype()
        return tuple(view.get_shape()), SAFETENSORS_DTYPES.get(kind, kind)

    def read(self, name: str) -> Tensor:
        return self.read_within((name,), name)

    def read_within(self, run: tuple[str, ...], name: str) -> Tensor:
        """One tensor of several that share one storage where they lie one after another.

        Args:
            run: the names of these, the same whichever of them is read.
        """
        if self._map is None:
            self._map, self._starts = _map(self.path)
        shape, dtype = self.describe(name)
        if math.prod(shape) == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        if len(run) > 1 and self._is_run(run):
            if run not in self._runs:
                self._runs[run] = self._bytes(run[0], sum(size_of(self, each) for each in run))
            start = self._starts[name] - self._starts[run[0]]
            found = self._runs[run].narrow(0, start, size_of(self, name))
        else:
            found = self._bytes(name, size_of(self, name))
        # Foreign writers may not align their data, and vector loads need it.
        if self._starts[name] % dtype.itemsize:
            found = found.clone()
        return found.view(dtype).view(shape)

    def _bytes(self, name: str, count: int) -> Tensor:
        """Bytes of the file from the beginning of a tensor on."""
        assert self._map is not None
        start = self._starts[name]
        return torch.frombuffer(self._map, dtype=torch.uint8, count=count, offset=start)

    def _is_run(self, names: tuple[str, ...]) -> bool:
        """Whether tensors lie one after another in this file."""
        end = self._starts.get(names[0], 0)
        for name in names:
            if self._starts.get(name) != end:
                return False
            end += size_of(self, name)
        return True


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint.

    Raises:
        CheckpointNotFoundError: the file is not there.
        CheckpointError: it is not JSON, not an object, or a Git-LFS pointer.
    """
    if not path.is_file():
        raise CheckpointNotFoundError(f"{path}: this file of the checkpoint is missing")
    refuse_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # of JSON and of UTF-8
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: needed a JSON object, got {type(value).__name__}")
    return value
