"""Files that are there whole or not at all."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor


def write_shard(path: Path, shape: tuple[int, int], rows: Iterable[Tensor], entries: bytes) -> None:
    """Writes a safetensors file piece by piece, so that its rows need not fit in memory.

    Args:
        path: of the file.
        shape: (n, E) of all embeddings.
        rows: pieces of them, in order.
        entries: stored as bytes: they outgrow the header, which may have 100 MB.
    """
    size = 4 * shape[0] * shape[1]
    tensors = {
        "embeddings": {"dtype": "F32", "shape": shape, "data_offsets": (0, size)},
        "entries": {
            "dtype": "U8",
            "shape": (len(entries),),
            "data_offsets": (size, size + len(entries)),
        },
    }
    header = json.dumps(tensors).encode()
    header += b" " * (-len(header) % 8)

    def content() -> Iterator[bytes | memoryview]:
        yield len(header).to_bytes(8, "little") + header
        for piece in rows:
            yield piece.detach().to("cpu", torch.float32).contiguous().numpy().data
        yield entries

    write_whole(path, content())


def write_whole(path: Path, content: Iterable[bytes | memoryview]) -> None:
    """Puts a file in its place whole, and makes sure that it stays."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        for piece in content:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
