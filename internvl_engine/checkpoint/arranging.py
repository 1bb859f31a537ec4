"""What a chat model is in either layout: the fields of its config.json and the tensors of its file.

published      our names; InternLM2's where the language model was one, with q, k and v packed
transformers   its names; q, k and v of the vision tower apart
"""

import copy
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .dtypes import dtype_name
from .errors import listed
from .grouping import heads_of
from .layouts import INTERNLM2, TRANSFORMERS, Layout
from .names import LORA, canonical
from .rewriting import Read, Target, packs, rewrite
from .writing import Planned

PUBLISHED, OF_TRANSFORMERS = "published", "transformers"
_INTERNLM2, _LLAMA = "InternLM2ForCausalLM", "LlamaForCausalLM"
# Language models whose published class goes by tie_word_embeddings. The head of the others is a
# tensor of its own whatever the file says, and drawn at random where the file has none.
_MAY_TIE = ("Qwen3", "GptOss")

_TEMPLATE = "internvl2_5"  # of every checkpoint that comes in transformers' layout


@dataclass(frozen=True)
class Weights:
    """The weights of a model, to be written.

    Args:
        planned: by our names, with what peft puts into them.
        read: gives one of them.
        tied: name of a head that is not among them to that of the input embedding that it is.
    """

    planned: tuple[Planned, ...]
    read: Read
    tied: Mapping[str, str]


@dataclass(frozen=True)
class Arranged:
    """A checkpoint, to be written.

    Args:
        layout: "published" or "transformers".
        values: of config.json.
        targets: name to tensor, in the order of names.
        sources: reads what the targets are made of.
    """

    layout: str
    values: dict[str, Any]
    targets: dict[str, Target]
    sources: Read

    @property
    def planned(self) -> list[Planned]:
        return [target.planned for target in self.targets.values()]

    def read(self, name: str) -> Tensor:
        """A tensor of the file by its name there."""
        return self.targets[name].read(self.sources)


def arrange(config: Any, weights: Weights, layout: str) -> Arranged:
    """A chat model in a layout.

    Args:
        config: a VisionLanguageConfig, which stays as it is.
        layout: "published" or "transformers".

    Raises:
        ValueError: there is no such layout, or it cannot hold the model.
    """
    config = copy.deepcopy(config)
    names: Layout | None = TRANSFORMERS
    if layout == OF_TRANSFORMERS:
        _check_transformers(config, weights)
    elif layout == PUBLISHED:
        _check_alphas(config)
        names = _published_names(config, weights)
        weights = _with_heads(config, weights)
    else:
        raise ValueError(f"layout must be {PUBLISHED!r} or {OF_TRANSFORMERS!r}, got {layout!r}")
    config.tie_word_embeddings = config.llm_config.tie_word_embeddings = bool(weights.tied)
    config.dtype = Counter(each.dtype for each in weights.planned).most_common(1)[0][0]
    is_published = layout == PUBLISHED
    values = config.published_dict() if is_published else config.transformers_dict()
    for name in ("dtype", "torch_dtype", "_name_or_path"):
        values.pop(name, None)
    # Published files leave out what they have none of: their code prints a system_message of null.
    for name in ("system_message", "parts", "backbone_lora_alpha", "llm_lora_alpha"):
        if values.get(name, 0) is None:
            del values[name]
    if is_published and not values.get("template"):  # without which their class is not built
        values["template"] = _TEMPLATE
    values["torch_dtype" if is_published else "dtype"] = dtype_name(config.dtype)
    language = config.llm_config
    heads = heads_of(language.to_dict())
    targets = rewrite(weights.planned, names, heads, language.model_type)
    return Arranged(layout, values, dict(sorted(targets.items())), weights.read)


def arrange_quantized(config: Any, weights: Weights, layout: str | None) -> Arranged:
    """A chat model whose weights will be quantized, in the published layout under our own names:
    a form is read as it lies, and InternLM2's one tensor of q, k and v lies in another order.

    Raises:
        ValueError: another layout was asked for.
    """
    if layout not in (None, PUBLISHED):
        raise ValueError(
            f"layout={layout!r}: quantized weights are in the published layout, which alone reads "
            "them"
        )
    config = copy.deepcopy(config)
    if config.llm_architecture == _INTERNLM2:
        _become_llama(config)
    return arrange(config, weights, PUBLISHED)


def _check_transformers(config: Any, weights: Weights) -> None:
    """Raises where transformers' classes have no place for something."""
    adapters = [each.name for each in weights.planned if LORA.match(canonical(each.name))]
    if adapters:
        raise ValueError(
            f"transformers' layout has no LoRA, and the model has {listed(adapters)}: load it with "
            "merge_lora=True, merge it (model.language_model = model.language_model."
            "merge_and_unload(), vision_model alike), or save it with layout='published'"
        )
    strangers = [
        each.name
        for each in weights.planned
        if each.name.startswith("language_model.")
        and not each.name.startswith(("language_model.model.", "language_model.lm_head."))
    ]
    if strangers:
        raise ValueError(
            f"transformers' layout has language models of model.* and lm_head.* only, and this "
            f"{type(config.llm_config).__name__[:-6]} has {listed(strangers)}: save it with "
            "layout='published'"
        )
    if getattr(config, "parts", None):
        raise ValueError(
            "transformers' layout holds whole models, and this one was loaded with "
            f"parts={config.parts!r}"
        )


def _check_alphas(config: Any) -> None:
    for tower in ("backbone", "llm"):
        rank, alpha = getattr(config, f"use_{tower}_lora"), getattr(config, f"{tower}_lora_alpha")
        if rank and alpha not in (None, 2 * rank):
            warnings.warn(
                f"{tower}_lora_alpha is {alpha}: it is saved and read here, but the published code "
                f"takes 2 * rank, {2 * rank}",
                stacklevel=5,
            )


def _published_names(config: Any, weights: Weights) -> Layout | None:
    """The layout of the language model's published class, which may change in the configuration."""
    if config.llm_architecture != _INTERNLM2:
        return None
    if packs(weights.planned, INTERNLM2, weights.read):
        return INTERNLM2
    _become_llama(config)  # LoRA that was put on q, k and v
    return None


def _become_llama(config: Any) -> None:
    """Makes an InternLM2 the same model as the published code's LLaMA holds it."""
    config.llm_architecture = _LLAMA
    for name in ("auto_map", "attn_implementation"):  # of InternLM2's remote code
        config.llm_leftovers.pop(name, None)


def _with_heads(config: Any, weights: Weights) -> Weights:
    """The weights with tied heads written out, where the published class would not tie them."""
    if not weights.tied or config.llm_architecture.startswith(_MAY_TIE):
        return weights
    tied, read = dict(weights.tied), weights.read
    of_name = {each.name: each for each in weights.planned}
    heads = [replace(of_name[embedding], name=head) for head, embedding in tied.items()]
    return Weights((*weights.planned, *heads), lambda name: read(tied.get(name, name)), {})
