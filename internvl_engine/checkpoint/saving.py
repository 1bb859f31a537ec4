"""Writes chat models: weights to the bit, config.json, and what lay beside them."""

import copy
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..schemes import Rule
from . import ties
from .arranging import OF_TRANSFORMERS, PUBLISHED, Weights, arrange, arrange_quantized
from .contents import Contents
from .errors import CheckpointError, listed
from .families import CHAT
from .files import read_json
from .held import held_parts, held_rules, held_scheme, plain
from .layouts import TRANSFORMERS
from .placement import parse_size
from .quantized import FIELD, stated
from .quantizing import Quantizing
from .rewriting import Read
from .writing import ALIGNMENT, Planned, replaced_weights, write_shards, write_text

# Of the folder that a model came from. These say the same in both layouts.
TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt",
    "added_tokens.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
# These one layout's code reads and the other's does not, or in another meaning.
SETTINGS = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "generation_config.json",
)  # fmt: skip
# Of transformers' save_pretrained: what changes nothing here, and the only values of the others.
_IGNORED = ("save_function", "save_peft_format", "save_original_format", "token")
_ONLY = {"safe_serialization": True, "push_to_hub": False, "variant": None}
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class Origin:
    """Where a model came from.

    Args:
        folder: of the checkpoint, for the files beside the weights.
        layout: "published" or "transformers".
    """

    folder: Path
    layout: str


def layout_of(contents: Contents) -> str:
    """Which of the two layouts of chat models a checkpoint is in."""
    return OF_TRANSFORMERS if contents.layout is TRANSFORMERS else PUBLISHED


def chosen_layout(layout: str | None, origin: Origin | None, config: Any) -> str:
    """The layout asked for; else the one a model came from, where that holds its parts."""
    if layout is None:
        whole = not getattr(config, "parts", None)
        return origin.layout if origin is not None and whole else PUBLISHED
    return layout


def save_chat(
    model: Any,
    folder: str | Path,
    *,
    layout: str | None = None,
    max_shard_size: int | str = "5GB",
    quantized: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    is_main_process: bool = True,
    **options: Any,
) -> list[Path]:
    """Writes a chat model as a checkpoint.

    Args:
        model: a VisionLanguageModel, accelerated or not.
        folder: made where it is not there. A checkpoint in it is replaced when the new one is
            complete; tokenizer files in it stay.
        layout: "published" (OpenGVLab's internvl_chat) or "transformers"
            (InternVLForConditionalGeneration), which holds whole models only; None is the one that
            the model came from.
        max_shard_size: bytes or "5GB".
        quantized: write quantized weights as they are held, in the published layout, for
            `from_pretrained` to map; False writes their values in the dtype that they compute in.
        state_dict: the model's, in place of its own, as a trainer gathers it.
        is_main_process: others write nothing.
        options: of transformers' `save_pretrained`; those that would change what is written are
            refused.

    Returns:
        The files written.

    Raises:
        ValueError: there is no such layout, or it cannot hold the model.
        CheckpointError: the folder has no room.
    """
    _refuse(options)
    if not is_main_process:
        return []
    origin, folder = getattr(model, "origin", None), Path(folder)
    state = model.state_dict(keep_vars=True) if state_dict is None else state_dict
    config, weights = _config_now(model), _of_state(model, state)
    rules: dict[str, Rule] = {}
    if quantized:
        arranged = arrange_quantized(config, weights, layout)
        rules = held_rules(model, state, arranged.targets)
        settings = stated(held_scheme(model, state, rules), arranged.values["torch_dtype"])
        arranged.values[FIELD] = settings
    else:
        arranged = arrange(config, weights, chosen_layout(layout, origin, model.config))
    layout = arranged.layout
    arranged.values.update(remote_code(origin, layout))
    files = Quantizing(arranged.planned, arranged.read, rules, lambda name: held_parts(state[name]))
    written = write_checkpoint(
        folder, arranged.values, files.planned, files.read, max_shard_size, files.alignment
    )
    generation = getattr(model.language_model, "generation_config", None)
    if layout == OF_TRANSFORMERS and generation is not None:
        written.append(folder / "generation_config.json")
        write_text(written[-1], generation.to_json_string())
    return written + copy_companions(origin, folder, layout)


def _refuse(options: Mapping[str, Any]) -> None:
    if unknown := set(options) - {*_IGNORED, *_ONLY}:
        raise TypeError(f"save_pretrained: {listed(unknown)} is no argument of it")
    for name, value in _ONLY.items():
        if options.get(name, value) != value:
            raise ValueError(f"save_pretrained: {name}={options[name]!r} is not supported")


def _config_now(model: Any) -> Any:
    """The configuration with what was set on the model, and with the LoRA that its towers have now,
    however it came or went."""
    config = copy.deepcopy(model.config)
    config.img_context_token_id = model.img_context_token_id
    for start, tower in CHAT.lora.items():
        module = getattr(model, start.rstrip("."))
        adapters = list((getattr(module, "peft_config", None) or {}).values())
        rank = adapters[0].r if adapters else 0
        setattr(config, f"use_{tower}_lora", rank)
        setattr(config, f"{tower}_lora_alpha", adapters[0].lora_alpha if adapters else None)
    return config


def _of_state(model: Any, state: Mapping[str, Tensor]) -> Weights:
    tied = {
        each.head: each.embedding
        for each in ties.heads(model)
        if each.head in state and _is_one(state[each.head], state[each.embedding])
    }

    kept = {name: tensor for name, tensor in state.items() if name not in tied}
    planned = tuple(Planned(name, tuple(t.shape), t.dtype) for name, t in kept.items())
    return Weights(planned, lambda name: plain(state[name]), tied)


def _is_one(head: Tensor, embedding: Tensor) -> bool:
    """Whether two tensors are the same memory."""
    if head is embedding:
        return True
    alike = type(head) is type(embedding) and head.shape == embedding.shape
    return alike and not head.is_meta and head.data_ptr() == embedding.data_ptr() != 0


def write_checkpoint(
    folder: Path,
    values: Mapping[str, Any],
    planned: list[Planned],
    read: Read,
    max_shard_size: int | str,
    alignment: int = ALIGNMENT,
) -> list[Path]:
    """Writes weights, then config.json.

    Args:
        values: of config.json.
        planned, read, max_shard_size, alignment: as `write_shards`.

    Raises:
        CheckpointError: the folder has no room.
    """
    written = write_weights(folder, planned, read, max_shard_size, alignment)
    write_text(folder / "config.json", json.dumps(values, indent=2, sort_keys=True) + "\n")
    return [*written, folder / "config.json"]


def write_weights(
    folder: Path,
    planned: list[Planned],
    read: Read,
    max_shard_size: int | str,
    alignment: int = ALIGNMENT,
) -> list[Path]:
    """Writes weights in place of those that a folder has; it is made where it is not there.

    Args, Raises: as `write_checkpoint`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    check_room(folder, planned)
    with replaced_weights(folder):
        written = write_shards(folder, planned, read, parse_size(max_shard_size), alignment)
    for path in folder.iterdir():  # shards of an earlier, longer checkpoint
        if _SHARD.fullmatch(path.name) and path not in written:
            path.unlink()
    return written


def check_room(folder: Path, planned: list[Planned]) -> None:
    """Raises where a folder has no room for tensors.

    Raises:
        CheckpointError: it has not.
    """
    needed, free = sum(tensor.size for tensor in planned), shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(f"{folder}: needed {needed:,} bytes of room, there are {free:,}")


def remote_code(origin: Origin | None, layout: str) -> dict[str, Any]:
    """The field of config.json that names the Python files of a published folder, which others may
    run; here nothing of them is."""
    if origin is None or (origin.layout, layout) != (PUBLISHED, PUBLISHED):
        return {}
    path = origin.folder / "config.json"
    stated = read_json(path).get("auto_map") if path.is_file() else None
    return {"auto_map": stated} if stated and any(origin.folder.glob("*.py")) else {}


def copy_companions(origin: Origin | None, folder: Path, layout: str) -> list[Path]:
    """Copies the files beside the weights that a folder does not have yet."""
    if origin is None:
        return []
    names = list(TOKENIZER)
    if layout == origin.layout:
        names += [*SETTINGS, *(path.name for path in origin.folder.glob("*.py"))]
    missing = [n for n in names if (origin.folder / n).is_file() and not (folder / n).exists()]
    for name in missing:
        shutil.copyfile(origin.folder / name, folder / name)
    return [folder / name for name in missing]
