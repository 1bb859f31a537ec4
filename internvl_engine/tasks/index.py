"""A searchable index of the images in a folder, kept on disk; how it lies there, shards.py says.

Indexing goes on where a killed run stopped, and embeds only what is new: a file of the same size
and time is known, and so is one of the same content under another name. Search is exact: one matrix
product over every shard.
"""

import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .embedder import Embedder, Mode, unit
from .folder import embed_files, image_files, is_known
from .shards import Shards

FOLDER = ".internvl_index"  # inside the folder of images, where no other place is given
EXTENSIONS = frozenset(
    f".{name}"
    for name in "jpg jpeg png webp bmp gif tif tiff ppm pgm jp2 ico avif".split()
)  # fmt: skip
SHARD_SIZE = 512  # images
PARTS_OF_MODE = {"c": ("vision", "text"), "g": ("vision", "queries", "text")}


class Hit(NamedTuple):
    """A file that was found, and the cosine of its image with the query."""

    path: str
    score: float


@dataclass
class Report:
    """What one run did; `broken` has the reason for every file that could not be read."""

    added: int = 0
    unchanged: int = 0
    removed: int = 0
    broken: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


class FolderIndex:
    """An index on disk: `FolderIndex.build` makes or updates one, `FolderIndex.open` reads one.

    Args:
        shards: its files.
        report: of the run that made it, where one did.
    """

    def __init__(self, shards: Shards, report: Report | None = None) -> None:
        self.shards, self.report = shards, report

    @classmethod
    def build(
        cls,
        engine: Embedder,
        folder: str | os.PathLike,
        output: str | os.PathLike | None = None,
        *,
        mode: Mode = "c",
        recursive: bool = True,
        extensions: Collection[str] = EXTENSIONS,
        batch_size: int = 32,
        shard_size: int = SHARD_SIZE,
        progress: Callable[[int, int], object] | None = None,
    ) -> "FolderIndex":
        """Embeds the images of a folder that the index does not know yet.

        Args:
            engine: with embeddings of images.
            folder: its files with the extensions, sorted; names that begin with a dot are left out.
            output: folder of the index; None is `.internvl_index` in the folder.
            mode: "c" or "g".
            recursive: also the folders in it (links to folders are not followed).
            extensions: in lower case, with the dot.
            batch_size: images at a time.
            shard_size: images between two writes, which come every 30 seconds at the latest.
            progress: called with (files done, files in all).

        Returns:
            The index; its `report` tells what was added, unchanged, removed and broken. A file that
            can not be read never stops the run.

        Raises:
            NotADirectoryError: there is no such folder.
            ValueError: the index there was made by another model or in another mode.
            BlockingIOError: another process is writing it.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise NotADirectoryError(f"index: {folder} is not a folder")
        started = time.perf_counter()
        output = folder / FOLDER if output is None else Path(output)
        report = Report()
        shards = Shards.create(output, _identity(engine, mode))
        check_identity(shards, engine, mode)
        with shards.writing():
            files = dict(image_files(folder, recursive, extensions))
            changed = [
                (name, path) for name, path in files.items() if not is_known(shards, name, path)
            ]
            report.unchanged = len(files) - len(changed)
            for done in embed_files(engine, shards, changed, batch_size, shard_size):
                if progress is not None:
                    progress(report.unchanged + done, len(files))
            report.removed = _forget(shards, files)  # last: a moved file is known by its content
            shards.compact()
        report.broken = {path: e.error for path, e in shards.entries.items() if e.error}
        report.added = len(changed) - sum(name in report.broken for name, _ in changed)
        report.seconds = time.perf_counter() - started
        return cls(shards, report)

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "FolderIndex":
        """Reads an index: its own folder, or the folder of images that holds it.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged.
        """
        inner = Path(folder) / FOLDER
        return cls(Shards(inner if inner.is_dir() else Path(folder)))

    def __len__(self) -> int:
        return sum(not entry.error for entry in self.shards.entries.values())

    def search(self, engine: Embedder, query: Any, k: int = 10) -> list[Hit]:
        """The k nearest images, the nearest first; equal ones in the order of their names.

        Args:
            engine: of the model that made the index.
            query: a text; an image that is not a string; or an embedding (E,).
            k: how many.

        Raises:
            ValueError: k is below 1, the query is not one text or image, or the index is of another
                model.
        """
        if k < 1:
            raise ValueError(f"search: k must be 1 or more, got {k}")
        mode = self.shards.identity["mode"]
        check_identity(self.shards, engine, mode)
        vector = _query(engine, query, mode)
        hits: list[Hit] = []
        for paths, embeddings in self.shards.live():
            scores = embeddings @ vector
            least = scores.topk(min(k, len(scores))).values[-1]
            near = (scores >= least).nonzero().flatten()  # all of equal score: the names decide
            found = zip(near.tolist(), scores[near].tolist(), strict=True)
            hits += [Hit(paths[row], score) for row, score in found]
            hits = sorted(hits, key=lambda hit: (-hit.score, hit.path))[:k]
        return hits


def check_identity(shards: Shards, engine: Embedder, mode: str) -> None:
    """Raises ValueError where embeddings of the engine can not be compared with those on disk."""
    theirs, here = shards.identity, f"index: {shards.folder}"
    if theirs["mode"] != mode:
        raise ValueError(
            f"{here} holds embeddings of mode {theirs['mode']!r}, not {mode!r}; use another output "
            "folder for a second mode"
        )
    ours = engine.fingerprint
    common = [p for p in PARTS_OF_MODE[mode] if p in theirs["fingerprint"] and p in ours]
    same = all(theirs["fingerprint"][part] == ours[part] for part in common)
    if not same or not (common or theirs["model"] == engine.name):
        raise ValueError(
            f"{here} was made by {theirs['model']}, whose weights are not those of {engine.name}; "
            "use that model, or index the folder again into another output folder"
        )


def _identity(engine: Embedder, mode: str) -> dict[str, Any]:
    return {
        "model": engine.name,
        "fingerprint": engine.fingerprint,
        "mode": mode,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "width": engine.model.config.clip_embed_dim,
    }


def _query(engine: Embedder, query: Any, mode: Mode) -> Tensor:
    """The embedding (E,) of a query, on the CPU."""
    if isinstance(query, str):
        found = engine.encode_text(query)
    elif isinstance(query, Tensor) and query.ndim == 1:
        found = unit(query.float())[None]
    else:
        found = engine.encode_image(query, mode)
    width = engine.model.config.clip_embed_dim
    if found.shape != (1, width):
        raise ValueError(
            f"search: the query must be one text, one image or an embedding ({width},), got "
            f"{tuple(found.shape)}"
        )
    return found[0].cpu()


def _forget(shards: Shards, files: Collection[str]) -> int:
    """Drops what the index knows and the folder no longer has; how many."""
    gone = [path for path in shards.entries if path not in files]
    if gone:
        shards.append([], torch.empty(0, shards.identity["width"]), gone)
    return len(gone)
