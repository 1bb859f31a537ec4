"""A searchable index of the images in a folder, kept on disk; how it lies there, shards.py says.

Indexing goes on where a killed run stopped, and embeds only what is new: a file of the same size
and time is known, and so is one of the same content under another name. What could not be read is
tried again by every run, and what merely cannot be seen at present stays.
"""

import os
import time
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..embedding import Embedder, Mode
from ..embedding.batches import checked_batch_size
from .embed import embed_files, is_known
from .folder import EXTENSIONS, Listing, gone, list_images, normal_extensions
from .identity import check_model, check_pictures, identity
from .search import nearest, query_vector
from .shards import Entry, Shards

FOLDER = ".internvl_index"  # inside the folder of images, where no other place is given
SHARD_SIZE = 512  # images


class Hit(NamedTuple):
    """A file that was found: its path, the cosine of its image with the query, its name.

    name: relative to the folder that was indexed.
    """

    path: str
    score: float
    name: str


@dataclass
class Report:
    """What one run did.

    broken: the reason for every file that cannot be used.
    kept: files and folders of the index that could not be read or seen this time, and why.
    skipped: how many files of each ending were no images by their names.
    """

    added: int = 0
    unchanged: int = 0
    removed: int = 0
    broken: dict[str, str] = field(default_factory=dict, repr=False)
    kept: dict[str, str] = field(default_factory=dict, repr=False)
    skipped: dict[str, int] = field(default_factory=dict, repr=False)
    seconds: float = 0.0

    def __str__(self) -> str:
        counts = f"{self.added} added, {self.unchanged} unchanged, {self.removed} removed"
        return f"{counts}, {len(self.broken)} broken ({self.seconds:.1f} s)"


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
            output: folder of the index, which holds one folder; None is `.internvl_index` in it.
            mode: "c" or "g".
            recursive: also the folders in it (links to folders are not followed).
            extensions: endings of the names, as "png".
            batch_size: images at a time.
            shard_size: images between two writes, which come every 30 seconds at the latest.
            progress: called with (files done, files in all).

        Returns:
            The index; its `report` tells what was added, unchanged, removed and broken. A file that
            cannot be read never stops the run.

        Raises:
            NotADirectoryError: there is no such folder.
            ValueError: the index there was made by another model, in another mode or of another
                folder; or the model gives no finite embeddings.
            BlockingIOError: another process is writing it.
        """
        folder, started = Path(folder), time.perf_counter()
        if not folder.is_dir():
            raise NotADirectoryError(f"index: {folder} is not a folder")
        engine.check_mode(mode)
        batch_size = checked_batch_size(batch_size)
        output = folder / FOLDER if output is None else Path(output)
        endings = normal_extensions(extensions)
        report = Report()
        with Shards.writing(output, partial(identity, engine, mode, folder, output)) as shards:
            check_model(shards, engine, mode)
            check_pictures(shards, engine, folder)
            listing = list_images(folder, recursive, endings, output)
            files = listing.files
            changed = [(name, path) for name, path in files.items()
                       if not is_known(shards, name, path)]  # fmt: skip
            report.unchanged = done = len(files) - len(changed)
            for results in embed_files(engine, shards, changed, batch_size, shard_size):
                for entry, is_news in results:
                    _count(report, shards, entry, is_news)
                done += len(results)
                if progress is not None:
                    progress(done, len(files))
            _forget(shards, folder, listing, report)  # last: a moved file is known by its content
            shards.compact()
        report.broken = {path: e.error for path, e in shards.entries.items() if e.error}
        report.skipped = dict(listing.skipped)
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
        return sum(len(shard) for shard in self.shards.shards.values())

    def __repr__(self) -> str:
        made = self.shards.identity
        return (
            f"FolderIndex({len(self)} images of {self.shards.images}, mode {made['mode']!r}, "
            f"made by {made['model']}, in {self.shards.folder})"
        )

    def __reduce__(self) -> tuple:  # its rows are mapped from the files
        return _reopened, (self.shards.folder, self.report)

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
        check_model(self.shards, engine, mode)
        found = nearest(self.shards, query_vector(engine, query, mode), k)
        images = self.shards.images
        return [Hit(str(images / name), score, name) for name, score in found]


def _reopened(folder: Path, report: Report | None) -> FolderIndex:
    return FolderIndex(Shards(folder), report)


def _count(report: Report, shards: Shards, entry: Entry, is_news: bool) -> None:
    """Notes what became of a file; those that are broken are counted in the end."""
    if is_news:
        report.added += not entry.error
    elif shards.entries[entry.path].error:  # still broken
        report.unchanged += 1
    else:
        report.kept[entry.path] = entry.error


def _forget(shards: Shards, folder: Path, listing: Listing, report: Report) -> None:
    """Drops what the index knows and the folder no longer has, as far as that can be seen."""
    unlisted = [path for path in shards.entries if path not in listing.files]
    lost, unseen = gone(unlisted, folder, listing)
    if lost:
        shards.append([], shards.no_rows(), lost)
    report.removed = len(lost)
    report.kept |= unseen
    for place, reason in report.kept.items():
        warnings.warn(
            f"index: {place} of {folder} cannot be looked at ({reason}); what the index has of it "
            "is kept",
            stacklevel=4,
        )
