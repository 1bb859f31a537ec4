"""The settings of a chat processor in a folder: the published layout, transformers', and our own.

    published     config.json has everything; preprocessor_config.json mean and deviation
    transformers  config.json, preprocessor_config.json (or a part of processor_config.json), and a
                  chat template beside the tokenizer
    ours          processor_config.json, over what config.json says

The size of a tile and its number of tokens are the model's: config.json decides where it is there.
"""

import json
from pathlib import Path
from typing import Any

from ..checkpoint.files import read_json
from ..printable import printable
from .chat_templates import sentence_in, takes_pictures
from .files import CLIP_STYLE, MODEL, OURS

CONVERSATION = "conversation.py"
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
NAME = "VisionLanguageProcessor"
FIELDS = {  # of the tile processor: in published files, in transformers'
    "dynamic": ("dynamic_image_size", "crop_to_patches"),
    "min_tiles": ("min_dynamic_patch", "min_patches"),
    "max_tiles": ("max_dynamic_patch", "max_patches"),
    "use_thumbnail": ("use_thumbnail", None),
    "pad2square": ("pad2square", None),
}
PUBLISHED_DEFAULTS = {"dynamic": False, "min_tiles": 1, "max_tiles": 6, "use_thumbnail": False}


def chat_settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of the tile processor, and the others of a chat processor, that a folder asks for.

    Raises:
        ValueError: a damaged file, a checkpoint of another family, or nothing says the size.
    """
    config = _read(folder / MODEL)
    stored, images = _read(folder / OURS), _read(folder / CLIP_STYLE)
    tiles: dict[str, Any] = {}
    others: dict[str, Any] = {}
    if "llm_config" in config or config.get("model_type") == "internvl_chat":
        tiles, others = config_settings(config, folder / CONVERSATION)
    elif "text_config" in config or stored.get("processor_class") == "InternVLProcessor":
        images = images or stored.get("image_processor") or {}
        tiles, others = _transformers(config, stored, images)
    elif config:
        raise ValueError(
            f"{NAME}: {printable(folder)} has a model of type {config.get('model_type')!r}, no "
            "chat checkpoint (those have a vision_config and an llm_config or text_config); the "
            "14B goes with InternVLProcessor"
        )
    for key, name in (("mean", "image_mean"), ("std", "image_std")):
        if images.get(name) is not None:
            tiles[key] = images[name]
    if stored.get("processor_class") == NAME:
        own = stored.get("tiles") or {}
        model = {key: tiles[key] for key in ("size",) if key in tiles}
        tiles |= own | model
        rest = {k: v for k, v in stored.items() if k not in ("processor_class", "tiles")}
        others = rest | {k: v for k, v in others.items() if k == "num_image_token"}
    if tiles.get("size") is None or others.get("num_image_token") is None:
        raise ValueError(
            f"{NAME}: nothing in {printable(folder)} says the size of a tile and its number of "
            f"tokens; {MODEL} of the checkpoint does"
        )
    return tiles, others


def config_settings(
    config: dict[str, Any], conversation: Path | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `chat_settings`, of a published configuration.

    Args:
        config: contents of config.json.
        conversation: the published file that may have the sentence of the system.
    """
    tiles = PUBLISHED_DEFAULTS | {
        key: config[name] for key, (name, _) in FIELDS.items() if config.get(name) is not None
    }
    vision = config.get("vision_config") or {}
    side = config.get("force_image_size") or _side(vision.get("image_size", 224))
    patch, ratio = _side(vision.get("patch_size", 14)), config.get("downsample_ratio", 0.5)
    template, sentence = config.get("template"), config.get("system_message")
    if sentence is None and template is not None and conversation is not None:
        sentence = sentence_in(conversation, template)
    others = {
        "num_image_token": int((side // patch) ** 2 * ratio**2),
        "template": template,
        "system_message": sentence,
    }
    return tiles | {"size": side}, others


def picture_template(tokenizer: Any, folder: Path) -> str | None:
    """The Jinja template in a folder that says where pictures go; None where there is none.

    Args:
        tokenizer: read from the folder; older files have the template beside it.
        folder: of the checkpoint.
    """
    jinja, old = (folder / name for name in TEMPLATE_FILES)
    found = [getattr(tokenizer, "chat_template", None), _read(old).get("chat_template")]
    if jinja.is_file():
        found.append(jinja.read_text(encoding="utf-8"))
    return next((t for t in found if isinstance(t, str) and takes_pictures(t)), None)


def write_settings(
    folder: Path, tiles: dict[str, Any], others: dict[str, Any], layout: str
) -> list[str]:
    """Writes what `chat_settings` reads, in a layout; returns the paths.

    Args:
        folder: where to.
        tiles: arguments of the tile processor.
        others: the remaining ones of the chat processor.
        layout: "published" or "transformers".
    """
    side, mean, std = tiles["size"], list(tiles["mean"]), list(tiles["std"])
    common = {
        "do_normalize": True, "do_resize": True, "image_mean": mean, "image_std": std,
        "resample": 3,
    }  # fmt: skip
    if layout == "published":
        files = {
            CLIP_STYLE: common
            | {"feature_extractor_type": "CLIPFeatureExtractor", "do_center_crop": True,
               "crop_size": side, "size": side},
            OURS: {"processor_class": NAME, **others, "tiles": tiles},
        }  # fmt: skip
    else:
        files = {
            CLIP_STYLE: common
            | {"image_processor_type": "GotOcr2ImageProcessor", "do_convert_rgb": True,
               "do_rescale": True, "processor_class": "InternVLProcessor",
               "crop_to_patches": tiles["dynamic"], "min_patches": tiles["min_tiles"],
               "max_patches": tiles["max_tiles"], "size": {"height": side, "width": side}},
            OURS: {"processor_class": "InternVLProcessor",
                   "image_seq_length": others["num_image_token"]},
        }  # fmt: skip
    for name, values in files.items():
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    return [str(folder / name) for name in files]


def _transformers(
    config: dict[str, Any], stored: dict[str, Any], images: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    tiles = {
        key: images[name]
        for key, (_, name) in FIELDS.items()
        if name and images.get(name) is not None
    }
    # transformers' processor cuts images whatever the file of its image processor says.
    tiles |= {"dynamic": True, "use_thumbnail": True}
    vision = config.get("vision_config") or {}
    side = _side(vision.get("image_size") or images.get("size"))
    if side is not None:
        tiles["size"] = side
    tokens = config.get("image_seq_length") or stored.get("image_seq_length")
    return tiles, {"num_image_token": tokens}


def _side(size: Any) -> Any:
    """The one number in 448, [448, 448] and {"height": 448, "width": 448}."""
    values = list(size.values()) if isinstance(size, dict) else size
    if not isinstance(values, list | tuple):
        return values
    if not values or any(value != values[0] for value in values):
        raise ValueError(f"{NAME}: only square tiles are supported, got {size}")
    return values[0]


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{NAME}: {path} is no JSON object")
    return values
