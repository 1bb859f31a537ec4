"""The language model of a new chat model, and the rows of its embeddings for the new tokens."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checkpoint import Source, hub_options, load_language_model
from ..checkpoint.families import CHAT
from ..checkpoint.identify import family_of, language_fields
from ..configuration.language import language_class, read_language
from .vision_parts import move


@dataclass
class LanguagePart:
    """A causal language model, and what a published configuration would say about it."""

    model: Any
    architecture: str
    leftovers: dict[str, Any] = field(default_factory=dict)


def language_part(source: Any, options: dict[str, Any]) -> LanguagePart:
    """A language model.

    Args:
        source: directory or hub id of one, or of a chat model; or one of transformers, or a
            VisionLanguageModel: itself and not a copy.
        options: as `vision_part`.

    Raises:
        TypeError: source is no causal language model.
        ValueError: it has LoRA, or is of a class that transformers does not have.
    """
    if isinstance(source, str | Path):
        found = Source.find(source, **hub_options(options))
        model = load_language_model(source, **options)
        values = found.config or {}
        said = read_language(language_fields(values), published=family_of(values) is CHAT)
        return LanguagePart(model, said.architecture, said.leftovers)
    model = getattr(source, "language_model", source) if _is_ours(source) else source
    if hasattr(model, "get_base_model"):
        raise ValueError(
            "from_parts: the language model has LoRA; merge it first (merge_and_unload()), and "
            "wrap the new model (wrap_llm_lora)"
        )
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise TypeError(
            "from_parts: language must be a checkpoint or a causal language model of transformers, "
            f"got {type(source).__name__}"
        )
    expected = language_class(model.config)
    if not isinstance(model, expected):
        raise TypeError(
            f"from_parts: a {type(model.config).__name__} belongs to {expected.__name__}, got "
            f"{type(model).__name__}; give its directory, which needs no remote code"
        )
    if _is_ours(source):
        own = source.config
        return LanguagePart(move(model, options), own.llm_architecture, dict(own.llm_leftovers))
    own = read_language(model.config, published=False)
    return LanguagePart(move(model, options), own.architecture)


def _is_ours(source: Any) -> bool:
    return getattr(getattr(source, "config", None), "model_type", None) == "internvl_chat"


def place_tokens(words: LanguagePart, tokenizer: Any, source: Any, options: dict[str, Any]) -> Any:
    """Gives a language model and its tokenizer the special tokens of chat models.

    Both embedding tables get as many rows as the tokenizer has tokens, also where that is fewer;
    where no token is new, they only grow. New rows of the input are random, and the rows of new
    tokens in the output are the mean of the others.

    Args:
        words: the language model.
        tokenizer: object, directory or hub id; None looks into `source`, where that is one.
        options: about the hub.

    Returns:
        The tokenizer, or None where there is none.
    """
    from ..processing.special_tokens import add_special_tokens

    if isinstance(tokenizer, str | Path):
        tokenizer = _stored_tokenizer(tokenizer, options)
    elif tokenizer is None and isinstance(source, str | Path):
        try:
            tokenizer = _stored_tokenizer(source, options)
        except FileNotFoundError:
            pass
    if tokenizer is None:
        return None
    count = add_special_tokens(tokenizer)
    rows = words.model.get_input_embeddings().weight.shape[0]
    if count or rows < len(tokenizer):
        resize_vocabulary(words.model, len(tokenizer), count or len(tokenizer) - rows)
    return tokenizer


def _stored_tokenizer(source: str | Path, options: dict[str, Any]) -> Any:
    from ..processing.chat_tokenizer import FILES, load_tokenizer
    from ..processing.files import processor_folder

    if Path(source).is_file():  # a weight file, beside which the tokenizer lies
        source = Path(source).parent
    return load_tokenizer(processor_folder(source, files=FILES, name="from_parts", **options))


@torch.no_grad()
def resize_vocabulary(language: Any, size: int, new: int) -> None:
    """Resizes both embedding tables; the last rows are those of new tokens.

    Args:
        language: a causal language model.
        size: rows of both, as many as its tokenizer has tokens.
        new: how many of them are new tokens. Their output rows, and with a tied head their input
            rows too, become the mean of the others; input rows that did not exist are random.
    """
    before = language.get_input_embeddings().weight.shape[0]
    trains = {
        side: getattr(language, f"get_{side}_embeddings")().weight.requires_grad
        for side in ("input", "output")
    }
    language.resize_token_embeddings(size, mean_resizing=False)
    words, head = language.get_input_embeddings().weight, language.get_output_embeddings().weight
    if size > before:
        std = getattr(language.config, "initializer_range", None) or 0.02
        words[before:] = torch.randn_like(words[before:], dtype=torch.float32).mul_(std)
    head[-new:] = head[:-new].mean(0, dtype=torch.float32).to(head.dtype)
    words.requires_grad_(trains["input"])
    head.requires_grad_(trains["output"])
