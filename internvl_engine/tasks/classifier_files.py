"""Classifiers on disk: embeddings of labels that outlive the process that made them.

A file is named by the hash of all that its weights depend on, and holds them with a hash of name
and content: a file that was damaged, cut off or put there under another name is as good as none,
and is written anew. Files appear whole, by renaming, so that several processes may use a folder.
Together they stay below `LIMIT` bytes; those that were not used for longest go first.

The user's folder is `classifiers` in $INTERNVL_CACHE; where that is not set, in the platform's
place for caches ($XDG_CACHE_HOME or ~/.cache, ~/Library/Caches, %LOCALAPPDATA%). The environment
variable INTERNVL_CLASSIFIERS names another one; "off" keeps nothing on disk.
"""

import contextlib
import hashlib
import os
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIMIT = 512 << 20  # bytes: ImageNet-21k in 768 dimensions is 67 MB
NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
LEFT_OVER = 3600.0  # seconds after which an unfinished file belongs to no living process


def user_folder() -> Path | None:
    """Where classifiers are kept; None where nothing is to be."""
    chosen = os.environ.get("INTERNVL_CLASSIFIERS", "")
    if chosen.lower() in ("off", "0"):
        return None
    if chosen:
        return Path(chosen)
    if root := os.environ.get("INTERNVL_CACHE"):
        return Path(root) / "classifiers"
    try:
        home = Path.home()
    except RuntimeError:  # a user without a home
        return None
    if sys.platform == "darwin":
        caches = home / "Library" / "Caches"
    elif sys.platform == "win32":
        caches = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return caches / "internvl_engine" / "classifiers"


class ClassifierFiles:
    """The classifiers in one folder, which need not exist yet.

    Args:
        folder: may hold other files, which are left alone.
        limit: bytes of all classifiers together; a larger one is not kept.
    """

    def __init__(self, folder: str | os.PathLike, limit: int = LIMIT) -> None:
        self.folder, self.limit = Path(folder), limit

    @classmethod
    def at(cls, cache: str | os.PathLike | bool) -> "ClassifierFiles | None":
        """Those of a folder, the user's for True; None for False, or where the user keeps none."""
        if isinstance(cache, bool):
            folder = user_folder() if cache else None
            return None if folder is None else cls(folder)
        return cls(cache)

    def read(self, key: str, shape: tuple[int, int]) -> Tensor | None:
        """The weights (K, E) float32 under a key; None where there are none that can be trusted."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self._path(key)
        try:
            found = load(path.read_bytes())
            weights, digest = found["weights"], found["digest"]
        except (OSError, KeyError, ValueError, SafetensorError):
            return None
        if weights.shape != shape or weights.dtype != torch.float32:
            return None
        if not torch.equal(digest, _digest(key, weights)):
            return None
        with contextlib.suppress(OSError):  # a folder that may only be read serves as well
            os.utime(path)
        return weights

    def write(self, key: str, weights: Tensor) -> None:
        """Keeps weights (K, E) under a key, and removes what was not used for longest.

        Where the folder cannot be written there is a warning and nothing is kept.
        """
        from safetensors.torch import save

        weights = weights.detach().to("cpu", torch.float32).contiguous()
        content = save({"weights": weights, "digest": _digest(key, weights)})
        if len(content) > self.limit:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(len(content))
            handle, temporary = tempfile.mkstemp(".tmp", "classifier-", self.folder)
            try:
                with open(handle, "wb") as file:
                    file.write(content)
                os.replace(temporary, self._path(key))
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            warnings.warn(
                f"classifiers are not kept in {self.folder} ({error}); INTERNVL_CLASSIFIERS names "
                'another folder, or "off"',
                stacklevel=2,
            )

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _make_room(self, size: int) -> None:
        """Removes the oldest files until so many bytes more are within the limit."""
        used: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            left_over = path.name.startswith("classifier-") and path.suffix == ".tmp"
            if not (left_over or NAME.fullmatch(path.name)):
                continue
            with contextlib.suppress(OSError):  # another process removed it
                status = path.stat()
                if not left_over:
                    used.append((status.st_mtime, status.st_size, path))
                elif time.time() - status.st_mtime > LEFT_OVER:
                    path.unlink()
        total = size + sum(bytes_ for _, bytes_, _ in used)
        for _, bytes_, path in sorted(used, key=lambda entry: entry[:2]):
            if total <= self.limit:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            total -= bytes_


def _digest(key: str, weights: Tensor) -> Tensor:
    """(32,) uint8 of the key and the values."""
    digest: Any = hashlib.sha256(f"{key} {tuple(weights.shape)} ".encode())
    digest.update(weights.numpy().data)
    return torch.tensor(list(digest.digest()), dtype=torch.uint8, device="cpu")
