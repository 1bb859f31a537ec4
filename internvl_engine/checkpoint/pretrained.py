"""`from_pretrained`: builds a model without memory, then gives every parameter its tensor.

The model is built on the meta device, all names, shapes and dtypes are compared with the headers of
the files, and only then are weights read, one at a time, mapped where nothing has to be computed.
Nothing is initialised at random and nothing is left out: what is missing is an error.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..configuration import VisionLanguageConfig
from ..schemes import Scheme, scheme_of
from . import ties
from .adoption import adopt
from .arranging import PUBLISHED
from .building import build
from .configs import Reading, fields_of, read_config
from .contents import Contents
from .dtypes import check_quantized, resolve_dtype
from .fill import fill
from .grouping import heads_of
from .hub import hub_options
from .identify import (
    built_by,
    check_config,
    language_fields,
    needed_by,
    own_fields,
    refuse_adapter,
)
from .locate import Source
from .names import canonical, prefix_of
from .parts import drop_absent
from .placement import Placement, place
from .plan import Plan, Reader, match
from .quantized import refuse_quantized
from .saving import Origin, layout_of
from .tokens import IMG_CONTEXT, added_token_id


def load_pretrained(
    model_class: Any,
    source: str | Path,
    *,
    config: Any = None,
    dtype: torch.dtype | str | None = "auto",
    torch_dtype: torch.dtype | str | None = None,
    device: torch.device | str | int | None = None,
    device_map: Any = None,
    offload_folder: str | Path | None = None,
    max_memory: Mapping[Any, int | str] | None = None,
    parts: str | None = None,
    quantize: str | Scheme | None = None,
    merge_lora: bool = False,
    lora_alpha: float | None = None,
    strict: bool = True,
    progress: bool | None = None,
    output_loading_info: bool = False,
    **options: Any,
) -> Any:
    """Loads a model, in eval mode, from any layout of the family's checkpoints.

    Args:
        model_class: what to build; a tower finds its weights and configuration in a composite.
        source: directory, weight file or hub id.
        config: in place of the checkpoint's config.json: an object, a dict, or a path.
        dtype: a torch dtype or its name; "auto" is bfloat16 where the processor computes in it,
            else float32. Weights stored in that dtype stay mapped in their file and occupy no
            memory of their own. torch_dtype is the older name.
        device: where the weights go; None is the CPU.
        device_map: "auto", "balanced", "sequential", or module names to devices, "cpu" or "disk".
        offload_folder: for weights on disk that are not stored in dtype.
        max_memory: device number, "cpu" to bytes or "20GiB"; for device_map="auto".
        parts: "image", "text", "c", "g", "caption" or "all" of InternVL-14B; "vision" (with the
            projector), "language" or "all" of a chat model. The rest is neither read nor held, and
            using it raises. None is what the checkpoint holds.
        quantize: "int8", "int4" or "fp8": hold the large weights in that form, quantized one at a
            time while they are read. A checkpoint that `internvl convert --quantize` wrote needs
            no word: it is mapped as it is.
        merge_lora: fold LoRA into the weights it adapts, instead of building a model with LoRA.
        lora_alpha: LoRA's alpha, which published checkpoints do not store; None is the
            configuration's, else twice the rank.
        strict: False leaves out weights the model has no place for. Missing ones are always an
            error.
        progress: a bar on stderr; None shows one on a terminal.
        output_loading_info: also return which stored names were left out.
        options: revision, token, cache_dir, local_files_only, force_download and subfolder, as
            huggingface_hub takes them; fields of the configuration (force_image_size resizes the
            position table); and keywords of transformers' from_pretrained, which are ignored
            where they change nothing here.

    Raises:
        CheckpointError: a file is damaged, or its weights do not fit (a ValueError).
        CheckpointNotFoundError: something is missing (a FileNotFoundError also).
        TypeError, ValueError: an argument is unknown, not supported, or contradicts another.
    """
    dtype = dtype if torch_dtype is None else torch_dtype
    check_quantized(dtype, None if quantize is None else scheme_of(quantize))
    with _own_settings():
        model, plan, found = prepare(
            model_class, source, config=config, parts=parts, merge_lora=merge_lora,
            lora_alpha=lora_alpha, strict=strict, **options,
        )  # fmt: skip
        check_quantized(dtype, plan.contents.scheme)
        placement = place(model, device, device_map, max_memory, dtype)
        dtype = resolve_dtype(dtype, placement.main)
        scheme = _scheme(quantize, plan.contents)
        fill(model, plan, placement, dtype, offload_folder, progress, scheme)
        _finish(model, plan, found, placement, dtype)
    if not output_loading_info:
        return model
    info: dict[str, Any] = {"missing_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    return model, info | {"unexpected_keys": set(plan.contents.leftovers)}


def _scheme(quantize: str | Scheme | None, contents: Contents) -> Scheme | None:
    """What weights are quantized by while they are read; None where they stay as they are.

    Raises:
        ValueError: there is no such scheme, or the checkpoint was quantized by another one.
    """
    if quantize is None:
        return None
    scheme = scheme_of(quantize)
    if contents.scheme is None:
        return scheme
    if scheme != contents.scheme:
        raise ValueError(
            f"{contents.path}: quantize={scheme.name!r}, but its weights are quantized by "
            f"{contents.scheme.name!r}: leave quantize out, or take the checkpoint that it was "
            "made from"
        )
    return None


@contextmanager
def _own_settings() -> Iterator[None]:
    """Loads the same model inside the caller's inference_mode or autocast."""
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        yield


def prepare(
    model_class: Any,
    source: str | Path,
    *,
    config: Any = None,
    parts: str | None = None,
    merge_lora: bool = False,
    lora_alpha: float | None = None,
    strict: bool = True,
    **options: Any,
) -> tuple[Any, Plan, Source]:
    """All of `load_pretrained` that comes before the first weight is read, and all its checks.

    Args, Raises: as `load_pretrained`.

    Returns:
        The model on the meta device, the plan of its weights, and the checkpoint.
    """
    family = built_by(model_class.config_class)
    if parts not in (None, "all") and family is None:
        raise ValueError(f"{model_class.__name__} is one part: parts must be None, got {parts!r}")
    needed_by(model_class, parts)  # before anything is downloaded: are there such parts?
    given = fields_of(config, model_class.config_class)
    found = Source.find(source, **hub_options(options))
    refuse_adapter(found, family)
    if given is None and found.config is not None:  # before weights are downloaded
        check_config(found.config, model_class.config_class, found.folder / "config.json")
    if family is not None and parts is None:
        parts = (given or {}).get("parts") or (found.config or {}).get("parts")
    needed = needed_by(model_class, parts)
    heads = heads_of(language_fields(given or found.config or {}))
    contents = Contents.read(found, found.weights(needed), needed, heads)
    reading = read_config(model_class.config_class, found, given, options, contents)
    if contents.scheme is None:
        stated = config is None and "quantization_config" not in options
        own = own_fields(found.config or {}, model_class.config_class) if stated else {}
        refuse_quantized(contents.path, contents.tensors, own)
    if lora_alpha is not None:
        if not contents.lora:
            raise ValueError(f"{found.path}: lora_alpha came, but the checkpoint has no LoRA")
        reading.alphas = dict.fromkeys(reading.alphas or [""], lora_alpha)
    contents.parts = reading.parts
    asked = dict(reading.overrides)
    if family is not None and family.forces_size:
        asked = {"force_image_size": (given or {}).get("force_image_size")} | asked
    size = asked.get("image_size") or asked.get("force_image_size")
    resize = adopt(reading, contents, merge_lora, size)
    model = build(model_class, reading.config)
    plan = _plan(model, reading, contents, parts, merge_lora, strict)
    plan.resize = resize
    return model, plan, found


def _plan(
    model: Any,
    reading: Reading,
    contents: Contents,
    parts: str | None,
    merge: bool,
    strict: bool,
) -> Plan:
    """Finds every weight of the model, which is cut to the parts first."""
    alphas, family = reading.alphas, built_by(type(model.config))
    if family is not None:
        parts = parts or reading.parts or "all"
        drop_absent(model, parts, family)
        model.config.parts = None if parts == "all" else parts
    else:
        prefix = prefix_of(map(canonical, model.state_dict()), contents.names)
        contents = contents.under(prefix)
        alphas = {"": next((a for tower, a in alphas.items() if prefix.startswith(tower)), None)}
    names, tied = match(model, contents, strict, merge)
    ties.record(model, tied, contents.path)
    vision = getattr(model.config, "vision_config", model.config)
    patch_size = getattr(vision, "patch_size", None)
    return Plan(names, contents, Reader(contents, merge, alphas), patch_size, tied=tied)


def _finish(
    model: Any, plan: Plan, source: Source, placement: Placement, dtype: torch.dtype
) -> None:
    """What a loaded model has beside its weights."""
    model.eval()
    model.config.dtype = dtype
    if not model.config.architectures:
        model.config.architectures = [type(model).__name__]
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.placement = placement
    model.name_or_path = str(source.path)  # where undo() finds wide weights again
    if isinstance(model.config, VisionLanguageConfig):
        model.origin = Origin(source.folder, layout_of(plan.contents))
        take_context_id(model, source)
        if model.origin.layout == PUBLISHED:  # whose code goes by llm_config
            return
    if source.json("generation_config.json") is not None:
        generator: Any = model if model.can_generate() else getattr(model, "language_model", None)
        if hasattr(generator, "generation_config"):
            generator.generation_config = GenerationConfig.from_pretrained(source.folder)


def take_context_id(model: Any, source: Source) -> None:
    """The placeholder's id out of the tokenizer's files, where the configuration has none."""
    if model.img_context_token_id is None:
        model.img_context_token_id = added_token_id(source, IMG_CONTEXT)
        model.config.img_context_token_id = model.img_context_token_id
