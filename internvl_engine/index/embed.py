"""The files of a folder on their way into an index: read in threads, embedded, written."""

import hashlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..embedding import Embedder, Mode
from ..embedding.batches import DECODING_THREADS
from ..processing import ImageError, load_image, read_image_file
from .shards import Entry, Shards

SHARD_SECONDS = 30.0  # a shard is written after so long, if it is not full before


class Looked(NamedTuple):
    """A file that was read: its picture (S, S, 3), or its embedding (E,) where that is known.

    unread: it is there, but could not be read; another time it may.
    """

    entry: Entry
    picture: np.ndarray | None = None
    embedding: Tensor | None = None
    unread: bool = False


def is_known(shards: Shards, name: str, path: Path) -> bool:
    """Whether the file is as it was when it was embedded, by size and time."""
    entry = shards.entries.get(name)
    if entry is None or entry.error:  # which may be mended without a trace in size and time
        return False
    try:
        status = path.stat()
    except OSError:
        return False  # reported when it is read
    return entry[1:3] == (status.st_size, status.st_mtime_ns)


def embed_files(
    engine: Embedder,
    shards: Shards,
    files: Sequence[tuple[str, Path]],
    batch_size: int,
    shard_size: int,
) -> Iterator[list[tuple[Entry, bool]]]:
    """Embeds files and writes them; the next batch is read meanwhile.

    Yields:
        What became of every file of a batch, and whether that is news to the index. Of a file that
        is in it and cannot be read at present the old embedding stays.

    Raises:
        ValueError: the model gives no finite embedding of anything.
    """
    entries: list[Entry] = []
    rows: list[Tensor] = []
    written = time.monotonic()
    ahead: deque[list] = deque()
    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        for start in range(0, len(files) + batch_size, batch_size):
            chunk = files[start : start + batch_size]
            ahead.append([pool.submit(_look, engine, shards, *file) for file in chunk])
            if start == 0:
                continue
            looked = _embed(engine, [future.result() for future in ahead.popleft()], shards)
            results = [(found.entry, _is_news(shards, found)) for found in looked]
            news = [found for found, (_, new) in zip(looked, results, strict=True) if new]
            entries += [found.entry for found in news]
            rows += [found.embedding for found in news if found.embedding is not None]
            late = time.monotonic() - written > SHARD_SECONDS
            if entries and (len(entries) >= shard_size or late or not chunk):
                shards.append(entries, torch.stack(rows) if rows else shards.no_rows())
                entries, rows, written = [], [], time.monotonic()
            yield results


def _look(engine: Embedder, shards: Shards, name: str, path: Path) -> Looked:
    processor = engine.processor.image_processor
    entry = Entry(name, 0, 0, "")
    try:
        status = path.stat()
        entry = entry._replace(size=status.st_size, mtime_ns=status.st_mtime_ns)
        content = read_image_file(path, processor.max_pixels)
        entry = entry._replace(hash=hashlib.blake2b(content, digest_size=16).hexdigest())
        known = shards.known(entry.hash)
        if known is not None:
            return Looked(entry, embedding=known)
        limits = {name: getattr(processor, name) for name in ("max_pixels", "max_aspect_ratio")}
        image = load_image(content, name=str(path), **limits)
        return Looked(entry, picture=processor.squares([image])[0].numpy())
    except ImageError as error:
        return Looked(entry._replace(error=str(error)))
    except MemoryError:
        return Looked(entry._replace(error=f"{path}: takes more memory than there is"))
    except OSError as error:
        return Looked(entry._replace(error=str(error) or type(error).__name__), unread=True)


def _is_news(shards: Shards, found: Looked) -> bool:
    """Whether the index must be told: not where it knows this, or knows better."""
    old = shards.entries.get(found.entry.path)
    return not (old is not None and (old == found.entry or (found.unread and not old.error)))


def _embed(engine: Embedder, looked: list[Looked], shards: Shards) -> list[Looked]:
    """The same files with their embeddings (E,); those whose embedding is not finite are broken."""
    fresh = [found for found in looked if found.picture is not None]
    if not fresh:
        return looked
    mode: Mode = shards.identity["mode"]
    options: dict[str, Any] = {"mode": mode, "batch_size": len(fresh)}
    pictures = [found.picture for found in fresh]
    errors: list[Exception | None] = [None] * len(fresh)
    rows: Any
    try:
        rows = engine.encode_image(pictures, **options).cpu()
    except ValueError:
        outcomes = list(engine.each_image(pictures, **options))
        errors, rows = [o.error for o in outcomes], [o.value for o in outcomes]
        if all(errors):
            _check_model(engine, mode)
    results = iter(zip(rows, errors, strict=True))
    embedded = []
    for found in looked:
        if found.picture is not None:
            row, error = next(results)
            reason = "" if error is None else str(error).partition(": ")[2]
            row = None if row is None else row.cpu()
            found = Looked(found.entry._replace(error=reason), embedding=row)
        embedded.append(found)
    return embedded


def _check_model(engine: Embedder, mode: Mode) -> None:
    """Raises ValueError where not the pictures but the model is at fault."""
    size = engine.processor.image_processor.size
    try:
        engine.encode_image(np.full((size, size, 3), 127, np.uint8), mode)
    except ValueError as error:
        raise ValueError(
            f"index: {engine.name} embeds nothing, not even a grey square ({error})"
        ) from error
