"""What a chat checkpoint needs beside its weights: a tokenizer that knows the placeholder."""

from typing import Any

from ..checkpoint import Source
from ..checkpoint.parts import AbsentModule
from ..processing.chat_tokenizer import load_tokenizer
from ..processing.special_tokens import IMAGE_CONTEXT
from .report import Report


def check_tokenizer(report: Report, source: Source, model: Any) -> None:
    """The tokenizer against the rows of the embedding, and the placeholder's id in both.

    Args:
        model: a VisionLanguageModel, whose img_context_token_id is set where it is known.
    """
    if isinstance(model.language_model, AbsentModule):
        return
    try:
        tokenizer = load_tokenizer(source.folder)
    except (OSError, ValueError, ImportError) as error:
        report.add("tokenizer", False, str(error))
        return
    rows = model.config.llm_config.vocab_size
    report.add("tokenizer", len(tokenizer) <= rows, f"{len(tokenizer):,} tokens, {rows:,} rows")
    known, wanted = tokenizer.get_vocab().get(IMAGE_CONTEXT), model.img_context_token_id
    found = f"{IMAGE_CONTEXT} is {known} in the tokenizer, the configuration says {wanted}"
    report.add("placeholder", known is not None and known == wanted, found)
