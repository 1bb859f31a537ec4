"""Processor settings on disk: the published layout and our own, in a directory or on the hub.

Ours is `processor_config.json` + `tokenizer.model`. The published one has `config.json` (which
knows the side of the image: `force_image_size`, else the vision tower's), `tokenizer.model`, and
`preprocessor_config.json` in the style of transformers' CLIP processor.
"""

import json
import os
from pathlib import Path
from typing import Any

OURS = "processor_config.json"
CLIP_STYLE = "preprocessor_config.json"
MODEL = "config.json"
TOKENIZER = "tokenizer.model"
BICUBIC = 3  # Pillow's number
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def locate(source: str | os.PathLike, name: str, **options: Any) -> Path | None:
    """Path of one file of a directory or hub repository, None where that has no such file.

    Args:
        source: directory, or hub id "owner/name".
        name: file.
        options: transformers' download options; others are ignored.

    Raises:
        FileNotFoundError: the directory does not exist, or the repository can not be reached.
    """
    options = {key: value for key, value in options.items() if key in HUB_OPTIONS}
    if os.path.isdir(source):
        path = Path(source, options.get("subfolder") or "", name)
        return path if path.is_file() else None
    text = os.fspath(source)
    if text.count("/") != 1 or text[0] in "/.~":
        raise FileNotFoundError(f"InternVLProcessor: no directory {text}")
    from transformers.utils import cached_file

    try:
        found = cached_file(text, name, _raise_exceptions_for_missing_entries=False, **options)
    except OSError as error:
        raise FileNotFoundError(
            f"InternVLProcessor: {text} is no directory here and could not be read from the hub: "
            f"{error}"
        ) from error
    return None if found is None else Path(found)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError naming the file where it is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"InternVLProcessor: {path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"InternVLProcessor: {path} must hold a JSON object")
    return values


def image_settings(source: str | os.PathLike, **options: Any) -> dict[str, Any]:
    """Arguments of InternVLImageProcessor that a directory or repository asks for.

    Raises:
        ValueError: nothing there says the size, or it asks for what we would not do alike.
    """
    settings: dict[str, Any] = {}
    ours = locate(source, OURS, **options)
    clip = locate(source, CLIP_STYLE, **options) if ours is None else None
    if ours is not None:
        stored = read_json(ours).get("image_processor")
        if not isinstance(stored, dict):
            raise ValueError(f"InternVLProcessor: {ours} has no image_processor settings")
        if {"geometry", "size"} <= set(stored):
            return stored
        settings = _from_clip(stored, ours)  # transformers 5 keeps CLIP's settings in there
    elif clip is not None:
        settings = _from_clip(read_json(clip), clip)
    model = locate(source, MODEL, **options)
    if model is not None:
        config = read_json(model)
        vision = config.get("vision_config", config)
        side = config.get("force_image_size") or vision.get("image_size")
        if side is not None:  # the model decides: its position table has that many patches
            settings["size"] = side
    if "size" not in settings:
        raise ValueError(
            f"InternVLProcessor: {source} has neither {OURS}, nor {CLIP_STYLE} with a size, nor "
            f"{MODEL} with an image size"
        )
    return settings


def _from_clip(values: dict[str, Any], path: Path) -> dict[str, Any]:
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


def _side(size: Any, path: Path) -> int | None:
    """The one number in 224, {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    sides = set(size.values()) if isinstance(size, dict) else {size}
    if len(sides) > 1:
        raise ValueError(f"InternVLProcessor: {path} has size {size}; images must be square")
    return sides.pop() if sides else None
