"""Where a checkpoint is, and which files hold its weights.

A source is a directory, a file, or an id on the Hugging Face hub. In a directory, the first of
these decides: an index of safetensors shards, model.safetensors, an index of .bin shards,
pytorch_model.bin, the standalone InternVL-C file, or the only weight file there is. An index whose
shards are gone counts for nothing beside the single file that took their place.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import CheckpointError, CheckpointNotFoundError, listed
from .files import read_json
from .hub import download
from .names import translate

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
STANDALONE = "internvl_c_13b_224px.pth"
_PAIRS = ((INDEXES[0], "model.safetensors"), (INDEXES[1], "pytorch_model.bin"))
_ORDER = (*(name for pair in _PAIRS for name in pair), STANDALONE)
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_UNREADABLE = "which cannot be read: take the checkpoint in safetensors"
_OTHERS = {  # what else is found in place of weights, and what makes weights of it
    "zero_to_fp32.py": "DeepSpeed's shards of an optimizer: run zero_to_fp32.py in it, which "
    "writes pytorch_model.bin",
    "**/*.distcp": "shards of torch.distributed.checkpoint: `python -m torch.distributed."
    "checkpoint.format_utils dcp_to_torch FOLDER pytorch_model.bin` makes one file of them",
    "*.gguf": f"GGUF files, {_UNREADABLE}",
    "tf_model.h5": f"TensorFlow's weights, {_UNREADABLE}",
    "flax_model.msgpack": f"Flax's weights, {_UNREADABLE}",
    "*.onnx": f"an ONNX graph, {_UNREADABLE}",
}
Needed = Callable[[str], bool]  # whether a tensor is wanted, by its published name


@dataclass
class Weights:
    """The weight files of a checkpoint.

    Args:
        shards: the weight file of every stored name, where an index tells; else None.
        file: the only weight file, where there is no index.
        index: the index itself, where there is one.
    """

    shards: dict[str, str] | None = None
    file: Path | None = None
    index: Path | None = None


@dataclass
class Source:
    """A checkpoint that somebody named; its JSON files are on this machine.

    Args:
        path: what the user named; messages say it.
        folder: the directory of its files.
        hub: the keywords of the download, where the weights may not be here yet; else None.
        subfolder: of a repository on the hub.
    """

    path: Path
    folder: Path
    hub: dict[str, Any] | None = None
    subfolder: str = ""

    @classmethod
    def find(cls, source: str | Path, **hub: Any) -> "Source":
        """Finds a checkpoint; of one on the hub, the JSON files are downloaded.

        Args:
            source: directory, weight file, index, or hub id.
            hub: revision, token, cache_dir, local_files_only, force_download, subfolder.

        Raises:
            CheckpointNotFoundError: nothing is there, or the hub cannot be reached.
        """
        subfolder = hub.pop("subfolder", None) or ""
        path = Path(source).expanduser()
        if path.is_file():
            return cls(path, path.parent)
        if path.is_dir():
            return cls(path / subfolder, path / subfolder)
        folder = download(str(source), [_inside(subfolder, "*.json")], **hub) / subfolder
        return cls(Path(source), folder, hub, subfolder)

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the checkpoint, or None where there is none of that name."""
        path = self.folder / name
        return read_json(path) if path.is_file() else None

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The contents of config.json, or None."""
        return self.json("config.json")

    def weights(self, needed: Needed | None = None) -> Weights:
        """Finds the weight files; those on the hub are downloaded, as far as they are needed.

        Args:
            needed: shards that hold nothing of it are not downloaded; None needs everything.

        Raises:
            CheckpointNotFoundError: there are none, or the hub cannot be reached.
            CheckpointError: the directory is ambiguous, or its index is damaged.
        """
        if self.hub is not None:
            self._download(needed, self.hub)
        return _of_file(self.path) if self.path.is_file() else _of_folder(self.folder)

    def _download(self, needed: Needed | None, hub: dict[str, Any]) -> None:
        index = self.folder / INDEXES[0]
        patterns = ["*.safetensors"] if not index.is_file() else _shards(read_index(index), needed)
        download(str(self.path), [_inside(self.subfolder, name) for name in patterns], **hub)
        if not any(self.folder.glob("*.safetensors")):  # an older repository
            patterns = [_inside(self.subfolder, f"*{suffix}") for suffix in (".bin", ".pth")]
            download(str(self.path), patterns, **hub)


def _inside(subfolder: str, name: str) -> str:
    return f"{subfolder}/{name}".lstrip("/")


def _shards(shards: dict[str, str], needed: Needed | None) -> list[str]:
    """The files of an index that hold anything that is needed."""
    stored = translate(shards).stored
    wanted = (name for name in stored if needed is None or needed(name))
    return sorted({shards[piece] for name in wanted for piece in stored[name]})


def _of_file(path: Path) -> Weights:
    if path.name.endswith(".index.json"):
        return Weights(shards=read_index(path), index=path)
    if path.suffix not in SUFFIXES:
        raise CheckpointError(
            f"{path}: a checkpoint file ends in {', '.join(SUFFIXES)} or .index.json"
        )
    return Weights(file=path)


def _of_folder(folder: Path) -> Weights:
    if not folder.is_dir():
        raise CheckpointNotFoundError(f"{folder}: there is no such directory")
    for name in _ORDER:
        if (folder / name).is_file() and not _is_outdated(folder, name):
            return _of_file(folder / name)
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(files) == 1:
        return Weights(file=files[0])
    if files:
        raise CheckpointError(
            f"{folder}: no {INDEXES[0]} says how these weight files belong together: "
            f"{listed(path.name for path in files)}; name one of them, or add the index"
        )
    others = next((text for name, text in _OTHERS.items() if any(folder.glob(name))), None)
    if others is not None:
        raise CheckpointNotFoundError(f"{folder}: no weights here, but {others}")
    raise CheckpointNotFoundError(
        f"{folder}: no weights here; needed {', '.join(_ORDER)}, or one file that ends in "
        f"{', '.join(SUFFIXES)}"
    )


def _is_outdated(folder: Path, name: str) -> bool:
    """Whether an index is left over from a save in shards that a save in one file replaced."""
    single = dict(_PAIRS).get(name)
    if single is None or not (folder / single).is_file():
        return False
    return not all((folder / file).is_file() for file in read_index(folder / name).values())


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
