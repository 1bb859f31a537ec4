"""The files of an index: shards that are only ever added, so that a kill at any moment harms none.

    index.json               what made the embeddings: model, fingerprint, mode, width; of which
                             folder the images are, relative to the index where that lies in it
    shard-000000.safetensors "embeddings" (n, E), and "entries", JSON: the files they are of (and
                             files that could not be read), and "gone", files that are no more
    lock                     held by the process that writes

A shard is written to a temporary file, forced to disk and renamed: it is there whole or not at all.
Later shards overrule earlier ones; one marked "base" replaces all before it. Embeddings are mapped,
never read whole: an index may be larger than memory.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import write_shard, write_whole

FORMAT = 2
HEAD = "index.json"
MANY_SHARDS = 256  # compacted beyond, and where more than half of the rows are dead
READINGS = 5  # of a folder that somebody compacts meanwhile
PIECE = 2**22  # bytes of rows that are copied at a time when shards are compacted


class Entry(NamedTuple):
    """A file as it was when it was embedded; `error` says why it could not be."""

    path: str
    size: int
    mtime_ns: int
    hash: str
    error: str = ""


class Shard:
    """Embeddings (n, E), mapped, the files they are of, and which of these are current (n,)."""

    def __init__(self, paths: list[str], rows: Tensor) -> None:
        self.paths, self.rows = paths, rows
        self.alive = torch.ones(len(paths), dtype=torch.bool, device="cpu")

    def __len__(self) -> int:
        return int(self.alive.sum())


class Shards:
    """The shards of one folder, and what is current in them.

    Args:
        folder: of an index that exists.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: it is damaged, or of another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        if not (folder / HEAD).is_file():
            raise FileNotFoundError(f"index: there is no index in {folder}; make one first")
        try:
            self.identity: dict[str, Any] = json.loads((folder / HEAD).read_text("utf-8"))
            known = self.identity["format"] == FORMAT and self.identity["width"] > 0
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"index: {folder / HEAD} is damaged ({error!r})") from error
        if not known:
            raise ValueError(
                f"index: {folder / HEAD} is of format {self.identity['format']}, not {FORMAT}; "
                "delete the folder, and index again"
            )
        self.reload()

    @property
    def images(self) -> Path:
        """The folder that the paths of entries are relative to."""
        return Path(os.path.normpath(self.folder / self.identity.get("folder", ".")))

    def reload(self) -> None:
        """Reads what is on disk now.

        Raises:
            ValueError: a shard is damaged.
        """
        for _ in range(READINGS):
            self._clear()
            try:
                for number in self._numbers():
                    self._take(number, *_read(self._path(number), number))
                return
            except FileNotFoundError:  # compacted meanwhile: what replaces it is there already
                continue
        raise BlockingIOError(
            f"index: another process keeps writing {self.folder}; wait until it has finished"
        )

    def _clear(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.shards: dict[int, Shard] = {}
        self._place: dict[str, tuple[int, int]] = {}  # of the current row: shard, row
        self._by_hash: dict[str, str] = {}

    def _take(
        self, number: int, entries: Sequence[Entry], rows: Tensor, gone: Iterable[str], base: bool
    ) -> None:
        """Adds what is in one shard."""
        if base:
            self._clear()
        for path in gone:
            self.entries.pop(path, None)
            self._bury(path)
        shard = Shard([entry.path for entry in entries if not entry.error], rows)
        self.shards[number] = shard
        row = 0
        for entry in entries:
            self._bury(entry.path)
            self.entries[entry.path] = entry
            if not entry.error:
                self._place[entry.path] = (number, row)
                self._by_hash[entry.hash] = entry.path
                row += 1

    def _bury(self, path: str) -> None:
        place = self._place.pop(path, None)
        if place is not None:
            self.shards[place[0]].alive[place[1]] = False

    @classmethod
    @contextmanager
    def writing(cls, folder: Path, identity: Callable[[], dict[str, Any]]) -> Iterator["Shards"]:
        """The index in a folder, to be written; it is made where there is none.

        The lock is lost by a killed process, and what one left behind is cleared away.

        Args:
            folder: of the index.
            identity: what index.json says of a new one.

        Raises:
            BlockingIOError: another process is writing.
            PermissionError: the folder cannot be written.
        """
        import fcntl

        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / "lock", "w")
        except PermissionError as error:
            raise PermissionError(
                f"index: {folder} cannot be written ({error.strerror}); give another output folder"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(
                    f"index: another process is writing {folder}; wait until it has finished"
                ) from None
            for left in folder.glob("*.tmp"):
                left.unlink()
            if not (folder / HEAD).exists():
                text = json.dumps({"format": FORMAT, **identity()}, indent=2) + "\n"
                write_whole(folder / HEAD, [text.encode()])
            yield cls(folder)

    def no_rows(self) -> Tensor:
        """What to append where there is nothing but entries: (0, E) float32."""
        return torch.empty(0, self.identity["width"], dtype=torch.float32, device="cpu")

    def append(
        self,
        entries: Sequence[Entry],
        rows: Tensor | Iterable[Tensor],
        gone: Iterable[str] = (),
        base: bool = False,
    ) -> None:
        """Adds one shard.

        Args:
            entries: files, those with an error among them.
            rows: (n, E), of the entries without an error, in their order; or pieces of them.
            gone: files that are no longer there.
            base: this shard replaces all that are there.
        """
        number = max(self._numbers(), default=-1) + 1
        content = json.dumps({"entries": entries, "gone": list(gone), "base": base}).encode()
        shape = (sum(not entry.error for entry in entries), self.identity["width"])
        pieces = [rows] if isinstance(rows, Tensor) else rows
        write_shard(self._path(number), shape, pieces, content)
        self._take(number, *_read(self._path(number), number))

    def known(self, hash: str) -> Tensor | None:
        """The embedding (E,) of a file with this content, where one is current."""
        path = self._by_hash.get(hash)
        if path not in self._place or self.entries[path].hash != hash:
            return None
        number, row = self._place[path]
        return self.shards[number].rows[row]

    def live(self) -> Iterator[tuple[list[str], Tensor]]:
        """Paths and embeddings (n, E) of what is current, up to PIECE bytes at a time."""
        size = max(PIECE // (4 * self.identity["width"]), 1)
        for shard in self.shards.values():
            for rows in shard.alive.nonzero().flatten().split(size):
                yield [shard.paths[row] for row in rows.tolist()], shard.rows[rows]

    def compact(self) -> None:
        """Writes everything current as one shard where much is dead or there are many shards."""
        stored = sum(len(shard.paths) for shard in self.shards.values())
        if len(self.shards) <= MANY_SHARDS and stored <= 2 * len(self._place) + 1:
            return
        entries = [self.entries[path] for paths, _ in self.live() for path in paths]
        entries += [entry for entry in self.entries.values() if entry.error]
        self.append(entries, (rows for _, rows in self.live()), base=True)
        for number in self._numbers():
            if number not in self.shards:
                self._path(number).unlink()

    def _numbers(self) -> list[int]:
        names = self.folder.glob("shard-*.safetensors")
        return sorted(int(path.stem.rpartition("-")[2]) for path in names)

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:06}.safetensors"


def _read(path: Path, number: int) -> tuple[list[Entry], Tensor, list[str], bool]:
    """Entries, embeddings, gone and base of a shard."""
    try:
        with safe_open(path, "pt") as file:
            rows = file.get_tensor("embeddings")
            content = json.loads(file.get_tensor("entries").numpy().tobytes())
        entries = [Entry(*row) for row in content["entries"]]
        if len(rows) != sum(not entry.error for entry in entries):
            raise ValueError(f"{len(rows)} embeddings of {len(entries)} files")
        return entries, rows, content["gone"], content["base"]
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"index: {path} is damaged ({error}); delete it, and index again"
        ) from error
