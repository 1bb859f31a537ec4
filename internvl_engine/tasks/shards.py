"""The files of an index: shards that are only ever added, so that a kill at any moment harms none.

    index.json               what made the embeddings: model, fingerprint, mode, width
    shard-000000.safetensors embeddings (n, E), and in the metadata: "entries", the files they are
                             of (and files that could not be read); "gone", files that are no more
    lock                     held by the process that writes

A shard is written to a temporary file, forced to disk and renamed: it is there whole or not at all.
Later shards overrule earlier ones; one marked "base" replaces all before it.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

FORMAT = 1
HEAD = "index.json"
MANY_SHARDS = 256  # compacted beyond, and where more than half of the rows are dead


class Entry(NamedTuple):
    """A file as it was when it was embedded; `error` says why it could not be."""

    path: str
    size: int
    mtime_ns: int
    hash: str
    error: str = ""


class Shards:
    """The shards of one folder, and what is current in them.

    Args:
        folder: of an index that exists.

    Raises:
        FileNotFoundError: there is no index.
        ValueError: it is damaged, or of another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / HEAD).is_file():
            raise FileNotFoundError(f"index: there is no index in {folder}; make one first")
        try:
            self.identity: dict[str, Any] = json.loads((folder / HEAD).read_text("utf-8"))
            known = self.identity["format"] == FORMAT and self.identity["width"] > 0
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"index: {folder / HEAD} is damaged ({error!r})") from error
        if not known:
            raise ValueError(f"index: {folder / HEAD} is not of format {FORMAT}; index again")
        self.reload()

    @classmethod
    def create(cls, folder: Path, identity: dict[str, Any]) -> "Shards":
        """The index in a folder, which is made where there is none; an old identity stays."""
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / HEAD).exists():
            text = json.dumps({"format": FORMAT, **identity}, indent=2) + "\n"
            _write(folder / HEAD, text.encode())
        return cls(folder)

    def reload(self) -> None:
        """Reads what is on disk now."""
        self.entries: dict[str, Entry] = {}
        self._place: dict[str, tuple[int, int]] = {}  # of the current row: shard, row
        self._rows: dict[int, Tensor] = {}
        self._by_hash: dict[str, str] = {}
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            number = int(path.stem.rpartition("-")[2])
            try:
                with safe_open(path, "pt") as file:
                    metadata, embeddings = file.metadata(), file.get_tensor("embeddings")
                entries = [Entry(*row) for row in json.loads(metadata["entries"])]
                gone, base = json.loads(metadata["gone"]), metadata["base"] == "1"
            except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"index: {path} is damaged ({error}); delete it, and index again"
                ) from error
            if base:
                self._clear()
            self._take(number, entries, embeddings, gone)

    def _clear(self) -> None:
        for known in (self.entries, self._place, self._rows, self._by_hash):
            known.clear()

    def _take(
        self, number: int, entries: Sequence[Entry], embeddings: Tensor, gone: Sequence[str]
    ) -> None:
        for path in gone:
            self.entries.pop(path, None)
            self._place.pop(path, None)
        row = 0
        for entry in entries:
            self.entries[entry.path] = entry
            self._place.pop(entry.path, None)
            if not entry.error:
                self._place[entry.path] = (number, row)
                self._by_hash[entry.hash] = entry.path
                row += 1
        self._rows[number] = embeddings

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Holds the lock, which a killed process loses, and clears away what one left behind.

        Raises:
            BlockingIOError: another process holds it.
        """
        import fcntl

        with open(self.folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(
                    f"index: another process is writing {self.folder}; wait until it has finished"
                ) from None
            for left in self.folder.glob("*.tmp"):
                left.unlink()
            self.reload()
            yield

    def append(
        self,
        entries: Sequence[Entry],
        embeddings: Tensor,
        gone: Sequence[str] = (),
        base: bool = False,
    ) -> None:
        """Adds one shard.

        Args:
            entries: files, those with an error among them.
            embeddings: (n, E), of the entries without an error, in their order.
            gone: files that are no longer there.
            base: this shard replaces all that are there.
        """
        number = max(self._numbers(), default=-1) + 1
        metadata = {
            "entries": json.dumps(entries),
            "gone": json.dumps(list(gone)),
            "base": str(int(base)),
        }
        embeddings = embeddings.detach().to("cpu", torch.float32).contiguous()
        _write(self._path(number), save({"embeddings": embeddings}, metadata))
        if base:
            self._clear()
        self._take(number, entries, embeddings, gone)

    def known(self, hash: str) -> Tensor | None:
        """The embedding (E,) of a file with this content, where one is current."""
        path = self._by_hash.get(hash)
        if path not in self._place or self.entries[path].hash != hash:
            return None
        number, row = self._place[path]
        return self._rows[number][row]

    def live(self) -> Iterator[tuple[list[str], Tensor]]:
        """Paths and embeddings (n, E) of what is current, shard by shard."""
        current: dict[int, list[tuple[int, str]]] = {}
        for path, (number, row) in self._place.items():
            current.setdefault(number, []).append((row, path))
        for number, found in sorted(current.items()):
            rows, paths = zip(*sorted(found), strict=True)
            stored = self._rows[number]
            yield list(paths), stored if len(rows) == len(stored) else stored[list(rows)]

    def compact(self) -> None:
        """Writes everything current as one shard where much is dead or there are many shards."""
        stored = sum(len(rows) for rows in self._rows.values())
        if len(self._rows) <= MANY_SHARDS and stored <= 2 * len(self._place) + 1:
            return
        live = [
            (path, row)
            for paths, rows in self.live()
            for path, row in zip(paths, rows, strict=True)
        ]
        broken = [entry for entry in self.entries.values() if entry.error]
        width = self.identity["width"]
        embeddings = torch.stack([row for _, row in live]) if live else torch.empty(0, width)
        self.append([self.entries[path] for path, _ in live] + broken, embeddings, base=True)
        for number in self._numbers():
            if number not in self._rows:
                self._path(number).unlink()

    def _numbers(self) -> list[int]:
        names = self.folder.glob("shard-*.safetensors")
        return sorted(int(path.stem.rpartition("-")[2]) for path in names)

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:06}.safetensors"


def _write(path: Path, content: bytes) -> None:
    """Puts a file in its place whole, and makes sure that it stays."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
