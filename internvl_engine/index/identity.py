"""What made the embeddings of an index, and whether a model may add to them or search them."""

from pathlib import Path
from typing import Any

from ..embedding import Embedder
from .shards import Shards

PARTS_OF_MODE = {"c": ("vision", "text"), "g": ("vision", "queries", "text")}


def identity(engine: Embedder, mode: str, folder: Path, output: Path) -> dict[str, Any]:
    """What index.json says of embeddings that the engine makes of a folder, in an index there."""
    return {
        "model": engine.name,
        "fingerprint": engine.fingerprint,
        "mode": mode,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "width": engine.model.config.clip_embed_dim,
        "pixels": _pixels(engine),
        "folder": _place(folder, output),
    }


def check_model(shards: Shards, engine: Embedder, mode: str) -> None:
    """Raises ValueError where embeddings of the engine cannot be compared with those on disk."""
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
        changed = ", which have changed since" if theirs["model"] == engine.name else ""
        raise ValueError(
            f"{here} was made by {theirs['model']}, whose weights are not those of {engine.name}"
            f"{changed}; use that model, or index the folder again into another output folder"
        )


def check_pictures(shards: Shards, engine: Embedder, folder: Path) -> None:
    """Raises ValueError where an index is of another folder, or of pictures of another form."""
    if shards.images != folder.resolve():
        raise ValueError(
            f"index: {shards.folder} holds the images of {shards.images}, not of {folder}; give "
            "another output folder (or, where that folder was moved, change "
            '"folder" in its index.json)'
        )
    theirs, ours = shards.identity["pixels"], _pixels(engine)
    if theirs != ours:
        changed = ", ".join(f"{name} {theirs.get(name)}" for name in ours if theirs.get(name)
                            != ours[name])  # fmt: skip
        raise ValueError(
            f"index: {shards.folder} was made of pictures with {changed}, which the processor has "
            "otherwise; index the folder again into another output folder"
        )


def _pixels(engine: Embedder) -> dict[str, Any]:
    """What the processor does to a picture."""
    processor = engine.processor.image_processor
    return {
        "size": processor.size,
        "geometry": processor.geometry,
        "mean": list(processor.mean),
        "std": list(processor.std),
    }


def _place(folder: Path, output: Path) -> str:
    """Where the images are: relative to an index that lies among them, and moves with them."""
    folder, output = folder.resolve(), output.resolve()
    if not output.is_relative_to(folder):
        return str(folder)
    return "/".join([".."] * len(output.relative_to(folder).parts)) or "."
