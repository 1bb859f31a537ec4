"""Where a checkpoint is, and which files hold its weights.

A source is a directory, a file, or an id on the Hugging Face hub. In a directory, the first of
these decides: an index of safetensors shards, model.safetensors, an index of .bin shards,
pytorch_model.bin, the standalone InternVL-C file, or the only weight file there is.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import CheckpointError, CheckpointNotFoundError, listed
from .files import read_json
from .hub import download
from .names import canonical

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
STANDALONE = "internvl_c_13b_224px.pth"
_ORDER = (INDEXES[0], "model.safetensors", INDEXES[1], "pytorch_model.bin", STANDALONE)
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


@dataclass
class Location:
    """A checkpoint on this machine.

    Args:
        path: what the user named; messages say it.
        folder: the directory of its files.
        shards: the weight file of every stored name, where an index tells; else None.
        file: the only weight file, where there is no index.
        index: the index itself, where there is one.
    """

    path: Path
    folder: Path
    shards: dict[str, str] | None = None
    file: Path | None = None
    index: Path | None = field(default=None)

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the checkpoint, or None where there is none of that name."""
        path = self.folder / name
        return read_json(path) if path.is_file() else None


def locate(source: str | Path, needed: Callable[[str], bool] | None = None, **hub: Any) -> Location:
    """Finds a checkpoint; one on the hub is downloaded, as far as it is needed.

    Args:
        source: directory, weight file, index, or hub id.
        needed: which published names are wanted; shards without any are not downloaded.
        hub: revision, token, cache_dir, local_files_only, subfolder.

    Raises:
        CheckpointNotFoundError: nothing is there, or the hub cannot be reached.
        CheckpointError: the directory is ambiguous, or its index is damaged.
    """
    subfolder = hub.pop("subfolder", None) or ""
    path = Path(source).expanduser()
    if path.is_file():
        return _of_file(path)
    if path.is_dir():
        return _of_folder(path / subfolder)
    folder = download(str(source), [f"{subfolder}/*.json".lstrip("/")], **hub) / subfolder
    patterns = _patterns(folder, needed)
    download(str(source), [f"{subfolder}/{name}".lstrip("/") for name in patterns], **hub)
    if not any(folder.glob("*.safetensors")):  # an older repository
        name = f"{subfolder}/*".lstrip("/")
        download(str(source), [name + ".bin", name + ".pth"], **hub)
    return _of_folder(folder)


def _of_file(path: Path) -> Location:
    if path.name.endswith(".index.json"):
        return Location(path, path.parent, shards=read_index(path), index=path)
    if path.suffix not in SUFFIXES:
        raise CheckpointError(
            f"{path}: a checkpoint file ends in {', '.join(SUFFIXES)} or .index.json"
        )
    return Location(path, path.parent, file=path)


def _of_folder(folder: Path) -> Location:
    if not folder.is_dir():
        raise CheckpointNotFoundError(f"{folder}: there is no such directory")
    for name in _ORDER:
        if (folder / name).is_file():
            found = _of_file(folder / name)
            return Location(folder, folder, found.shards, found.file, found.index)
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(files) == 1:
        return Location(folder, folder, file=files[0])
    if files:
        raise CheckpointError(
            f"{folder}: no {INDEXES[0]} says how these weight files belong together: "
            f"{listed(path.name for path in files)}; name one of them, or add the index"
        )
    raise CheckpointNotFoundError(
        f"{folder}: no weights here; needed {', '.join(_ORDER)}, or one file that ends in "
        f"{', '.join(SUFFIXES)}"
    )


def read_index(path: Path) -> dict[str, str]:
    """The weight_map of an index: the shard of every stored name.

    Raises:
        CheckpointError: it is not an index, or names files outside its directory.
    """
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{path}: needed a 'weight_map' of names to files, got {shards!r}")
    for name, shard in shards.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard:
            raise CheckpointError(f"{path}: {name} must lie in a file beside it, got {shard!r}")
    return shards


def _patterns(folder: Path, needed: Callable[[str], bool] | None) -> list[str]:
    index = folder / INDEXES[0]
    if not index.is_file():
        return ["*.safetensors"]
    shards = read_index(index)
    return sorted(
        {file for name, file in shards.items() if needed is None or needed(canonical(name))}
    )
