"""Processor settings on disk: the published layout and our own, in a directory or on the hub.

Ours is `processor_config.json` + `tokenizer.model`. The published one has `config.json` (which
knows the side of the image: `force_image_size`, else the vision tower's), `tokenizer.model`, and
`preprocessor_config.json` in the style of transformers' CLIP processor.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.files import read_json
from ..checkpoint.hub import download, hub_options
from ..printable import printable

OURS = "processor_config.json"
CLIP_STYLE = "preprocessor_config.json"
MODEL = "config.json"
TOKENIZER = "tokenizer.model"
BICUBIC = 3  # Pillow's number


def processor_folder(
    source: str | os.PathLike,
    *,
    files: Sequence[str] = (OURS, CLIP_STYLE, MODEL, TOKENIZER),
    name: str = "InternVLProcessor",
    **options: Any,
) -> Path:
    """The directory with a processor's files, downloaded from the hub where it is not one.

    All of them come in one call: a file that fails to arrive must not pass for one that is not
    there, because the others would then be read without it.

    Args:
        source: directory, or hub id "owner/name".
        files: what to download.
        name: of the processor, for errors.
        options: of which `checkpoint.HUB_OPTIONS` are taken; others, which transformers' Auto
            classes pass along, are ignored.

    Raises:
        FileNotFoundError: no such directory, or a repository that cannot be read and is not in
            the cache.
    """
    text, options = os.fspath(source), hub_options(options)
    subfolder = options.pop("subfolder", "")
    if os.path.isdir(source):
        return Path(source, subfolder)
    if text.count("/") != 1 or text[0] in "/.~":
        raise FileNotFoundError(f"{name}: no directory {printable(text)}")
    wanted = [os.path.join(subfolder, file) for file in files]
    return download(text, wanted, **options) / subfolder


def image_settings(folder: Path) -> dict[str, Any]:
    """Arguments of InternVLImageProcessor that a directory asks for.

    Raises:
        ValueError: nothing there says the size, or it asks for what we would not do alike.
    """
    settings: dict[str, Any] = {}
    ours, clip, model = folder / OURS, folder / CLIP_STYLE, folder / MODEL
    if ours.is_file():
        stored = read_json(ours).get("image_processor")
        if not isinstance(stored, dict):
            raise ValueError(f"InternVLProcessor: {ours} has no image_processor settings")
        settings = stored_settings(stored, ours)
    elif clip.is_file():
        settings = stored_settings(read_json(clip), clip)
    if model.is_file():
        config = read_json(model)
        vision = config.get("vision_config")
        vision = vision if isinstance(vision, dict) else config
        side = config.get("force_image_size") or vision.get("image_size")
        if side is not None:  # the model decides: its position table has that many patches
            settings["size"] = side
    if "size" not in settings:
        raise ValueError(
            f"InternVLProcessor: {folder} has neither {OURS}, nor {CLIP_STYLE} with a size, nor "
            f"{MODEL} with an image size"
        )
    return settings


def stored_settings(values: dict[str, Any], path: Path | str) -> dict[str, Any]:
    """Settings of a file, ours or CLIP's; transformers 5 keeps either in either file."""
    if {"geometry", "size"} <= set(values):
        return {key: value for key, value in values.items() if key != "image_processor_type"}
    return _from_clip(values, path)


def _from_clip(values: dict[str, Any], path: Path | str) -> dict[str, Any]:
    """Settings of a CLIP-style file; what would give other pixels than it asks for is refused."""
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if values.get(step, True) is False:
            raise ValueError(f"InternVLProcessor: {path} turns {step} off, which is not supported")
    if values.get("resample", BICUBIC) != BICUBIC:
        raise ValueError(
            f"InternVLProcessor: {path} asks for resample {values['resample']}, only bicubic "
            f"({BICUBIC}) is supported"
        )
    size, crop = values.get("size"), values.get("crop_size")
    settings: dict[str, Any] = {}
    short_side = isinstance(size, int) or (isinstance(size, dict) and "shortest_edge" in size)
    cropped = values.get("do_center_crop", crop is not None or short_side)
    settings["geometry"] = "clip" if cropped else "retrieval"
    side = _side(size, path)
    if cropped and crop is not None and side is not None and _side(crop, path) != side:
        raise ValueError(
            f"InternVLProcessor: {path} has size {size} but crop_size {crop}; only a crop of the "
            "resized short side is supported"
        )
    for key, value in (
        ("size", side or _side(crop, path)),
        ("mean", values.get("image_mean")),
        ("std", values.get("image_std")),
    ):
        if value is not None:
            settings[key] = value
    return settings


def _side(size: Any, path: Path | str) -> int | None:
    """The one number in 224, {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    sides = list(size.values()) if isinstance(size, dict) else [size]
    if size is None:
        return None
    if not sides or not all(isinstance(n, int) and n == sides[0] for n in sides):
        raise ValueError(f"InternVLProcessor: {path} has size {size}; needs one side of a square")
    return sides[0]
