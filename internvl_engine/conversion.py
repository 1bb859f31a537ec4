"""Any checkpoint into safetensors shards: LoRA merged, cast, cut to parts, in another layout.

Weights pass through one at a time: memory is that of the largest, whatever the model's size.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import CheckpointError, Origin, resolve_dtype
from .checkpoint.arranging import Weights, arrange
from .checkpoint.families import POSITIONS
from .checkpoint.fill import track
from .checkpoint.locate import SUFFIXES, Source
from .checkpoint.placement import parse_size
from .checkpoint.plan import Plan
from .checkpoint.pretrained import prepare, take_context_id
from .checkpoint.saving import (
    chosen_layout,
    copy_companions,
    layout_of,
    remote_code,
    write_checkpoint,
)
from .checkpoint.ties import heads
from .checkpoint.writing import Planned, write_shards
from .modeling.chat import VisionLanguageModel
from .modeling.vision import interpolate_positions
from .modeling.whole import whole_class

# What else a published directory holds and the converted one needs.
COMPANIONS = (
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "preprocessor_config.json", "processor_config.json", "generation_config.json",
)  # fmt: skip


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    parts: str | None = None,
    merge_lora: bool = False,
    lora_alpha: float | None = None,
    model_class: Any = None,
    layout: str | None = None,
    max_shard_size: int | str = "10GB",
    progress: bool | None = None,
    **options: Any,
) -> list[Path]:
    """Reads a checkpoint of any layout and writes it as safetensors shards with config.json.

    Args:
        source: directory, weight file or hub id, as `from_pretrained` takes it.
        target: directory; made where it is not there, and must hold no weights.
        dtype: of what is written; None keeps every weight's own.
        parts, merge_lora, lora_alpha: as `from_pretrained`.
        model_class: InternVLModel, VisionLanguageModel, or a tower's class, to write that tower
            alone; None is the class of the whole checkpoint.
        layout: of a chat model, "published" or "transformers"; None is the one it comes in.
        max_shard_size: bytes or "10GB".
        progress: a bar on stderr; None shows one on a terminal.
        options: further arguments of `from_pretrained`: config, strict, revision, overrides.

    Returns:
        The files written.

    Raises:
        CheckpointError: source is damaged, does not fit, or target has no room.
        ValueError: the layout cannot hold the model.
        FileExistsError: target holds weights already.
    """
    target = Path(target)
    if target.is_dir() and any(path.suffix in SUFFIXES for path in target.iterdir()):
        raise FileExistsError(f"{target}: holds weights already; give another directory")
    model_class = model_class or whole_class(source, **options)
    model, plan, found = prepare(
        model_class, source, parts=parts, merge_lora=merge_lora, lora_alpha=lora_alpha, **options
    )
    wanted = None if dtype is None else resolve_dtype(dtype, torch.device("cpu"))
    planned = [_planned(plan, name, wanted) for name in plan.names]
    if isinstance(model, VisionLanguageModel):
        return _convert_chat(model, plan, found, planned, target, layout, max_shard_size, progress)
    if layout is not None:
        raise ValueError(f"layout={layout!r}: only chat models have several")
    target.mkdir(parents=True, exist_ok=True)
    needed, free = sum(tensor.size for tensor in planned), shutil.disk_usage(target).free
    if needed > free:
        raise CheckpointError(f"{target}: needed {needed:,} bytes of room, there are {free:,}")
    dtypes = {tensor.name: tensor.dtype for tensor in planned}
    bar = track(dtypes, progress)

    def read(name: str) -> Tensor:
        next(bar, None)
        return _read(plan, name, dtypes[name])

    written = write_shards(target, planned, read, parse_size(max_shard_size))
    model.config.architectures = [model_class.__name__]
    model.config.dtype = wanted or max(dtypes.values(), key=list(dtypes.values()).count)
    if plan.resize:
        _say_size(model.config, plan.resize)
    model.config.save_pretrained(target)
    for name in COMPANIONS:
        if (found.folder / name).is_file():
            shutil.copyfile(found.folder / name, target / name)
    return [*written, target / "config.json"]


def _convert_chat(
    model: VisionLanguageModel,
    plan: Plan,
    found: Source,
    planned: list[Planned],
    target: Path,
    layout: str | None,
    max_shard_size: int | str,
    progress: bool | None,
) -> list[Path]:
    origin = Origin(found.folder, layout_of(plan.contents))
    layout = chosen_layout(layout, origin, model.config)
    take_context_id(model, found)
    if plan.resize:
        _say_size(model.config, plan.resize)
    dtypes = {tensor.name: tensor.dtype for tensor in planned}
    tied = {each.head: plan.tied[each.head] for each in heads(model) if each.head in plan.tied}

    def read(name: str) -> Tensor:
        return _read(plan, name, dtypes[name])

    arranged = arrange(model.config, Weights(tuple(planned), read, tied), layout)
    arranged.values.update(remote_code(origin, layout))
    bar = track(arranged.targets, progress)

    def count(name: str) -> Tensor:
        next(bar, None)
        return arranged.read(name)

    written = write_checkpoint(target, arranged, max_shard_size, count)
    return written + copy_companions(origin, target, layout)


def _planned(plan: Plan, name: str, dtype: torch.dtype | None) -> Planned:
    entry = plan.entry(name)
    shape = entry.shape
    if plan.resize and name.endswith(POSITIONS):
        shape = tuple(_read(plan, name, torch.float32).shape)
    return Planned(name, shape, dtype or entry.dtype)


def _read(plan: Plan, name: str, dtype: torch.dtype) -> Tensor:
    tensor = plan.read(name, dtype)
    if plan.resize and plan.patch_size and name.endswith(POSITIONS):
        side = plan.resize // plan.patch_size
        tensor = interpolate_positions(tensor, side, side)
    return tensor


def _say_size(config: Any, size: int) -> None:
    getattr(config, "vision_config", config).image_size = size
    if hasattr(config, "force_image_size"):
        config.force_image_size = size
