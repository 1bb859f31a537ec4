"""A chat model out of parts: a vision tower, a language model, and a projector, new or trained.

    VisionLanguageModel.from_parts("OpenGVLab/InternViT-300M-448px", "Qwen/Qwen3-8B")

Source: OpenGVLab/InternVL, internvl_chat_finetune.py, where neither a chat checkpoint nor an
assembled one is given.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.keywords import overrides_of
from ..configuration import VisionLanguageConfig
from .language_parts import language_part, place_tokens
from .projectors import load_projector
from .rotary import replace_dynamic_rotary
from .vision_parts import set_drop_path, vision_part

ARCHITECTURE = "InternVLChatModel"  # by which serving stacks know a published checkpoint
FORCED_SIZE = 448  # of every published chat model
SMALLEST_FORCED = 224  # towers for less are nobody's InternViT, and keep their own size
# Arguments of `from_pretrained` that are for both towers.
PASSED = {
    "torch_dtype", "device_map", "offload_folder", "max_memory", "merge_lora", "lora_alpha",
    "strict", "progress",
}  # fmt: skip


class FromParts:
    """`from_parts`, and what an assembled model has beside its weights."""

    config: Any
    tokenizer: Any = None  # of `from_parts`; saved beside the model

    @classmethod
    def from_parts(
        cls,
        vision: Any,
        language: Any,
        projector: Any = None,
        tokenizer: Any = None,
        *,
        force_image_size: int | None = None,
        select_layer: int = -1,
        ps_version: str = "v2",
        downsample_ratio: float = 0.5,
        template: str | None = None,
        system_message: str | None = None,
        dynamic_image_size: bool = False,
        use_thumbnail: bool = False,
        pad2square: bool = False,
        min_dynamic_patch: int = 1,
        max_dynamic_patch: int = 12,
        drop_path_rate: float | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | int | None = None,
        **options: Any,
    ) -> Any:
        """Makes a chat model of a vision tower and a language model.

        A part that is an object becomes a part of the new model, it is not copied: its position
        table, embeddings and configuration change with it. Train the projector first
        (`freeze(model)`), then what else should.

        Args:
            vision: directory, weight file or hub id of an InternViT, of an InternVL-14B, or of a
                chat model in any layout, whose vision tower is taken; or such a model, ours,
                transformers' or the published one.
            language: directory or hub id of a causal language model (InternLM2 too; no remote code
                is run), or of a chat model, whose language model is taken; or a causal language
                model of transformers, or a VisionLanguageModel.
            projector: None is new, in PyTorch's own initialisation; a file with the weights of a
                trained one (names 0.*, 1.*, 3.*, alone or below a prefix), or a checkpoint that
                has one; or a module of that structure.
            tokenizer: of the language model: object or directory; None is the one in the directory
                of `language`, if there is one. The special tokens that it lacks are added, to it
                and to both embedding tables. It is `model.tokenizer`, and is saved with the model.
            force_image_size: side of a tile in pixels. None is 448; the tower's own where that is
                smaller than 224. The position table is resized to it.
            select_layer, ps_version, downsample_ratio, template, system_message,
                dynamic_image_size, use_thumbnail, pad2square, min_dynamic_patch,
                max_dynamic_patch: as VisionLanguageConfig.
            drop_path_rate: of the vision tower; None keeps its own.
            dtype: of the towers that are loaded; "auto" as `from_pretrained`. Towers that are
                objects keep theirs unless this is another one. The projector is float32, and
                computes in it between towers of any dtype.
            device: of the whole model; None is the CPU, and where objects are.
            options: further ones of `from_pretrained` for both towers: token, cache_dir,
                local_files_only, merge_lora, progress, ...

        Returns:
            The model in eval mode.

        Raises:
            CheckpointError: a part is damaged, or something else than it should be.
            TypeError: a part is an object of another kind.
            ValueError: parts do not fit together, or an argument has no such value.
        """
        options = _loading(options) | {"dtype": options.get("torch_dtype") or dtype}
        options["device"] = device
        tower = vision_part(vision, options)
        words = language_part(language, options)
        if drop_path_rate is not None:
            set_drop_path(tower, drop_path_rate)
        size = force_image_size or _size(tower.config.image_size)
        config: Any = VisionLanguageConfig(
            tower.config, words.model.config, select_layer, ps_version, downsample_ratio, size,
            template, system_message, dynamic_image_size, use_thumbnail, pad2square,
            min_dynamic_patch, max_dynamic_patch, llm_architecture=words.architecture,
        )  # fmt: skip
        config.llm_leftovers = words.leftovers
        config.architectures = [ARCHITECTURE]
        config.dtype = words.model.dtype
        _check_size(config, size)
        if tower.config.image_size != size:
            tower.resize_pos_embeddings(tower.config.image_size, size, tower.config.patch_size)
        with torch.device("meta"):
            model: Any = cls(config)  # type: ignore[call-arg]
        model.vision_model, model.language_model = tower, words.model
        replace_dynamic_rotary(words.model)
        words_device = words.model.get_input_embeddings().weight.device
        if words_device.type == "meta":  # offloaded
            words_device = words.model.placement.main
        model.mlp1 = _projector(model.mlp1, projector, words_device)
        model.tokenizer = place_tokens(words, tokenizer, language, options)
        if model.tokenizer is not None:
            context = model.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
            config.img_context_token_id = model.img_context_token_id = context
        return model.eval()


def _loading(options: dict[str, Any]) -> dict[str, Any]:
    """The keywords that loading takes, of those that are no arguments of `from_parts`.

    Raises:
        TypeError, ValueError: one is unknown, or not supported.
    """
    others = {name: value for name, value in options.items() if name not in PASSED}
    if unknown := overrides_of(others, set()):
        raise TypeError(f"from_parts: {', '.join(sorted(unknown))} is no argument of it")
    return {name: value for name, value in options.items() if name != "torch_dtype"}


def _size(image_size: int) -> int:
    return FORCED_SIZE if image_size >= SMALLEST_FORCED else image_size


def _check_size(config: VisionLanguageConfig, size: Any) -> None:
    step = config.vision_config.patch_size * config.shuffle_factor
    if not isinstance(size, int) or size < step or size % step:
        raise ValueError(
            f"from_parts: force_image_size must be a multiple of {step} (patches of "
            f"{config.vision_config.patch_size}, {config.shuffle_factor} of a side to a token), "
            f"got {size}"
        )


def _projector(planned: nn.Sequential, given: Any, device: torch.device) -> nn.Module:
    """The projector: new, of a file, or the one given.

    Args:
        planned: as the configuration has it, on the meta device.
    """
    if isinstance(given, nn.Module):
        found, needed = (
            {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
            for module in (given, planned)
        )
        if found != needed:
            raise ValueError(
                "from_parts: between these towers a projector's weights must be "
                f"{_shapes(needed)}; the given {type(given).__name__} has {_shapes(found)}"
            )
        return given.to(device)
    if given is not None and not isinstance(given, str | Path):
        raise TypeError(
            "from_parts: projector must be a file, a checkpoint, a module or None, got "
            f"{type(given).__name__}"
        )
    module = planned.float().to_empty(device=device)
    layer: Any
    for layer in module:
        if next(layer.parameters(), None) is not None:
            layer.reset_parameters()
    if given is not None:
        load_projector(module, given)
    return module


def _shapes(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "none"
