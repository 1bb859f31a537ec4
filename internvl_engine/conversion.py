"""Any checkpoint into safetensors shards: merged, cast, cut to parts, quantized, in another layout.

Weights pass through one at a time: memory is that of the largest, whatever the model's size.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import CheckpointError, Origin, resolve_dtype
from .checkpoint.arranging import Weights, arrange, arrange_quantized
from .checkpoint.dtypes import check_quantized, dtype_name
from .checkpoint.families import POSITIONS
from .checkpoint.fill import track
from .checkpoint.forms import rules_of
from .checkpoint.locate import SUFFIXES, Source
from .checkpoint.plan import Plan
from .checkpoint.pretrained import prepare, take_context_id
from .checkpoint.quantized import FIELD, stated
from .checkpoint.quantizing import Quantizing
from .checkpoint.rewriting import Read
from .checkpoint.saving import (
    chosen_layout,
    copy_companions,
    layout_of,
    remote_code,
    write_checkpoint,
    write_weights,
)
from .checkpoint.ties import heads
from .checkpoint.writing import Planned, add_to_json
from .modeling.chat import VisionLanguageModel
from .modeling.vision import interpolate_positions
from .modeling.whole import whole_class
from .schemes import Scheme, scheme_of

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
    quantize: str | Scheme | None = None,
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
        quantize: "int8", "int4", "fp8" or a Scheme: large weights are written in that form, which
            `from_pretrained` maps as it is. A chat model is then in the published layout.
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
        CheckpointError: source is damaged, was quantized before, or does not fit, or target has no
            room.
        ValueError: the layout cannot hold the model, or quantized weights do not compute in dtype.
        FileExistsError: target holds weights already.
    """
    target = Path(target)
    if target.is_dir() and any(path.suffix in SUFFIXES for path in target.iterdir()):
        raise FileExistsError(f"{target}: holds weights already; give another directory")
    scheme = None if quantize is None else scheme_of(quantize)
    check_quantized(dtype, scheme)
    model_class = model_class or whole_class(source, **options)
    model, plan, found = prepare(
        model_class, source, parts=parts, merge_lora=merge_lora, lora_alpha=lora_alpha, **options
    )
    if plan.contents.scheme is not None:
        raise CheckpointError(
            f"{found.path}: its weights were quantized ({plan.contents.scheme.name}), and the bits "
            "that they lost are not in it: convert the checkpoint that it was made from"
        )
    wanted = None if dtype is None else resolve_dtype(dtype, torch.device("cpu"))
    planned = [_planned(plan, name, wanted) for name in plan.names]
    dtypes = {tensor.name: tensor.dtype for tensor in planned}

    def read(name: str) -> Tensor:
        return _read(plan, name, dtypes[name])

    if isinstance(model, VisionLanguageModel):
        tied = {each.head: plan.tied[each.head] for each in heads(model) if each.head in plan.tied}
        weights = Weights(tuple(planned), read, tied)
        if plan.resize:
            _say_size(model.config, plan.resize)
        return _convert_chat(
            model, weights, found, layout_of(plan.contents), target, layout, max_shard_size,
            progress, scheme,
        )  # fmt: skip
    if layout is not None:
        raise ValueError(f"layout={layout!r}: only chat models have several")
    rules = {} if scheme is None else rules_of(scheme, model, planned)
    files = Quantizing(planned, read, rules, place=found.path)
    read_shown = _shown(files, progress)
    written = write_weights(target, files.planned, read_shown, max_shard_size, files.alignment)
    model.config.architectures = [model_class.__name__]
    model.config.dtype = wanted or max(dtypes.values(), key=list(dtypes.values()).count)
    if plan.resize:
        _say_size(model.config, plan.resize)
    model.config.save_pretrained(target)
    if scheme is not None:
        add_to_json(target / "config.json", {FIELD: stated(scheme, dtype_name(model.config.dtype))})
    for name in COMPANIONS:
        if (found.folder / name).is_file():
            shutil.copyfile(found.folder / name, target / name)
    return [*written, target / "config.json"]


def _convert_chat(
    model: VisionLanguageModel,
    weights: Weights,
    found: Source,
    comes_in: str,
    target: Path,
    layout: str | None,
    max_shard_size: int | str,
    progress: bool | None,
    scheme: Scheme | None,
) -> list[Path]:
    origin = Origin(found.folder, comes_in)
    take_context_id(model, found)
    if scheme is None:
        arranged = arrange(model.config, weights, chosen_layout(layout, origin, model.config))
    else:
        arranged = arrange_quantized(model.config, weights, layout)
    layout = arranged.layout
    arranged.values.update(remote_code(origin, layout))
    rules = {} if scheme is None else rules_of(scheme, model, arranged.planned)
    if scheme is not None:
        arranged.values[FIELD] = stated(scheme, arranged.values["torch_dtype"])
    files = Quantizing(arranged.planned, arranged.read, rules, place=found.path)
    read = _shown(files, progress)
    written = write_checkpoint(
        target, arranged.values, files.planned, read, max_shard_size, files.alignment
    )
    return written + copy_companions(origin, target, layout)


def _shown(files: Quantizing, progress: bool | None) -> Read:
    """What reads the tensors of a file, with a bar."""
    bar = track((tensor.name for tensor in files.planned), progress)

    def read(name: str) -> Tensor:
        next(bar, None)
        return files.read(name)

    return read


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
