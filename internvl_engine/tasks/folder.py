"""The files of a folder on their way into an index: found, read in threads, embedded, written."""

import hashlib
import os
import time
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..processing import ImageError, load_image
from .batches import DECODING_THREADS
from .embedder import Embedder, Mode
from .shards import Entry, Shards

SHARD_SECONDS = 30.0  # a shard is written after so long, if it is not full before


def image_files(
    folder: Path, recursive: bool, extensions: Collection[str]
) -> Iterator[tuple[str, Path]]:
    """(name in the index, path) of the images, sorted."""
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if recursive else []
        for name in sorted(names):
            path = Path(here, name)
            if path.suffix.lower() in extensions and not name.startswith("."):
                yield path.relative_to(folder).as_posix(), path


def is_known(shards: Shards, name: str, path: Path) -> bool:
    """Whether the file is as it was when it was embedded, by size and time."""
    entry = shards.entries.get(name)
    try:
        status = path.stat()
    except OSError:
        return False  # reported when it is read
    return entry is not None and entry[1:3] == (status.st_size, status.st_mtime_ns)


class _Looked(NamedTuple):
    """A file that was read: its picture (S, S, 3), or its embedding (E,) where that is known."""

    entry: Entry
    picture: np.ndarray | None = None
    embedding: Tensor | None = None


def _look(engine: Embedder, shards: Shards, name: str, path: Path) -> _Looked:
    processor = engine.processor.image_processor
    entry = Entry(name, 0, 0, "")
    try:
        status = path.stat()
        entry = entry._replace(size=status.st_size, mtime_ns=status.st_mtime_ns)
        content = path.read_bytes()
        entry = entry._replace(hash=hashlib.blake2b(content, digest_size=16).hexdigest())
        known = shards.known(entry.hash)
        if known is not None:
            return _Looked(entry, embedding=known)
        limits = {name: getattr(processor, name) for name in ("max_pixels", "max_aspect_ratio")}
        image = load_image(content, name=str(path), **limits)
        return _Looked(entry, picture=processor.squares(image)[0].numpy())
    except (OSError, ImageError) as error:
        return _Looked(entry._replace(error=str(error) or type(error).__name__))


def embed_files(
    engine: Embedder,
    shards: Shards,
    files: list[tuple[str, Path]],
    batch_size: int,
    shard_size: int,
) -> Iterator[int]:
    """Embeds files and writes them; yields how many are done. The next batch is read meanwhile."""
    entries: list[Entry] = []
    rows: list[Tensor] = []
    written = time.monotonic()
    ahead: deque[list] = deque()
    done = 0
    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        for start in range(0, len(files) + batch_size, batch_size):
            chunk = files[start : start + batch_size]
            ahead.append([pool.submit(_look, engine, shards, *file) for file in chunk])
            if start == 0:
                continue
            looked = [future.result() for future in ahead.popleft()]
            entries += [found.entry for found in looked]
            rows.append(_embed(engine, looked, shards.identity["mode"]))
            done += len(looked)
            late = time.monotonic() - written > SHARD_SECONDS
            if entries and (len(entries) >= shard_size or late or not chunk):
                shards.append(entries, torch.cat(rows))
                entries, rows, written = [], [], time.monotonic()
            yield done


def _embed(engine: Embedder, looked: list[_Looked], mode: Mode) -> Tensor:
    """(n, E) of the files without an error."""
    pictures = [found.picture for found in looked if found.picture is not None]
    fresh = iter(engine.encode_image(pictures, mode, batch_size=max(len(pictures), 1)).cpu())
    rows = [
        next(fresh) if found.embedding is None else found.embedding
        for found in looked
        if not found.entry.error
    ]
    return torch.stack(rows) if rows else torch.empty(0, engine.model.config.clip_embed_dim)
