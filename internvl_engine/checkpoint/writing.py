"""Writes safetensors shards tensor by tensor, so that no shard is ever held in memory.

The format: 8 bytes with the length of a JSON header, the header (name to dtype, shape and place),
then the tensors' bytes one after another. Source: huggingface/safetensors, README.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import SAFETENSORS_DTYPES

_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
ALIGNMENT = 8  # of the first tensor, as the library does
CACHE_LINE = 64  # what vector loads of 512 bits want
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written.

    Args:
        group: tensors beside each other with the same group, which is not "", go into one file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    group: str = ""

    @property
    def size(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@contextmanager
def replaced_weights(folder: str | Path) -> Iterator[None]:
    """Removes the index, or the single file, that a save in the body leaves from an earlier one."""
    paths = [Path(folder, name) for name in (SINGLE, INDEX)]
    before = {path: _mark(path) for path in paths if path.is_file()}
    yield
    written = [path for path in paths if path.is_file() and before.get(path) != _mark(path)]
    for path in before:
        if written and path not in written:
            path.unlink(missing_ok=True)


def _mark(path: Path) -> tuple[int, int]:
    """Another one after the file was replaced or written to."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def write_shards(
    folder: Path,
    planned: list[Planned],
    read: Callable[[str], Tensor],
    max_shard_size: int,
    alignment: int = ALIGNMENT,
) -> list[Path]:
    """Writes the tensors as one file, or as shards with an index.

    Files get their names when all are complete: what lies in the folder stays whole where writing
    is cut off. An index goes before its shards are replaced, so that a folder in between, for the
    moment that takes, says that it is incomplete.

    Args:
        folder: exists.
        planned: all tensors, in the order they are written.
        read: gives one of them, in the planned shape and dtype, on the CPU.
        max_shard_size: bytes of tensors in one file; a larger tensor gets a file of its own.
        alignment: of tensors in a file, in bytes, but for those that follow a tensor of no such
            size: these come last. 8 is the library's own order.

    Returns:
        The files, the index last where there is one.
    """
    shards = _split(planned, max_shard_size)
    if len(shards) == 1:
        names = [SINGLE]
    else:
        count = len(shards)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    partial = [folder / f"{name}.partial" for name in names]
    try:
        for path, shard in zip(partial, shards, strict=True):
            _write(path, shard, read, alignment)
    except BaseException:  # a keyboard interrupt too
        for path in partial:
            path.unlink(missing_ok=True)
        raise
    written = [folder / name for name in names]
    if any(path.is_file() for path in written) and len(shards) > 1:
        (folder / INDEX).unlink(missing_ok=True)
    for path, complete in zip(partial, written, strict=True):
        path.replace(complete)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.size for tensor in planned)},
            "weight_map": {
                t.name: name for name, shard in zip(names, shards, strict=True) for t in shard
            },
        }
        write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
        written.append(folder / INDEX)
    return written


def _split(planned: Iterable[Planned], limit: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    size = 0
    for _, found in groupby(planned, key=lambda tensor: tensor.group or tensor.name):
        together = list(found)
        more = sum(tensor.size for tensor in together)
        if shards[-1] and size + more > limit:
            shards.append([])
            size = 0
        shards[-1] += together
        size += more
    return shards


def _write(
    path: Path, tensors: list[Planned], read: Callable[[str], Tensor], alignment: int
) -> None:
    def place(tensor: Planned) -> tuple[bool, int]:
        """The format allows no holes: wide dtypes first keeps every tensor aligned."""
        if alignment == ALIGNMENT:
            return False, -tensor.dtype.itemsize
        is_odd = tensor.size % alignment != 0
        return is_odd, -tensor.dtype.itemsize if is_odd else 0

    tensors = sorted(tensors, key=place)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.size],
        }
        end += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            value = read(tensor.name)
            assert (tuple(value.shape), value.dtype) == (tensor.shape, tensor.dtype), tensor.name
            file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Writes a text file, in place of an earlier one only when it is complete."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def add_to_json(path: Path, values: Mapping[str, Any]) -> None:
    """Adds fields to an object in a JSON file."""
    found = json.loads(path.read_text(encoding="utf-8"))
    write_text(path, json.dumps(found | dict(values), indent=2, sort_keys=True) + "\n")
