"""A chat processor from a folder or the hub, and back into a folder."""

import os
from pathlib import Path
from typing import Any

from .chat_files import CONVERSATION, NAME, chat_settings, picture_template, write_settings
from .chat_tokenizer import FILES, load_tokenizer, save_tokenizer
from .files import CLIP_STYLE, MODEL, OURS, processor_folder
from .tiles import InternVLTileProcessor

LAYOUTS = ("published", "transformers")


def read_processor(source: str | os.PathLike, options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a VisionLanguageProcessor.

    Args, Raises: as `VisionLanguageProcessor.from_pretrained`.
    """
    files = (*FILES, OURS, CLIP_STYLE, MODEL, CONVERSATION)
    folder = processor_folder(source, files=files, name=NAME, **options)
    tiles, others = chat_settings(folder)
    known = InternVLTileProcessor(**tiles).to_dict()
    tiles |= {k: options[k] for k in known if options.get(k) is not None}
    tokenizer = load_tokenizer(folder)
    if options.get("template") or options.get("chat_template"):
        others |= {k: options.get(k) for k in ("template", "chat_template")}
    elif not others.get("chat_template"):
        others["chat_template"] = picture_template(tokenizer, folder)
    if options.get("system_message") is not None:
        others["system_message"] = options["system_message"]
    images = InternVLTileProcessor(**tiles)
    return {"image_processor": images, "tokenizer": tokenizer, **others}


def write_processor(processor: Any, folder: Path, layout: str) -> list[str]:
    """Writes a VisionLanguageProcessor; returns the paths.

    Args: as `VisionLanguageProcessor.save_pretrained`.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"{NAME}: layout must be one of {LAYOUTS}, got {layout!r}")
    folder.mkdir(parents=True, exist_ok=True)
    names, template = {}, ""
    if layout == "transformers":
        names = processor.prompts.names()
        template = processor.prompts.jinja(processor.system_message)
    written = save_tokenizer(processor.tokenizer, folder, names, template)
    others = {
        "num_image_token": processor.num_image_token,
        "template": processor.template_name,
        "chat_template": processor.chat_template,
        "system_message": processor.system_message,
    }
    return written + write_settings(folder, processor.image_processor.to_dict(), others, layout)
