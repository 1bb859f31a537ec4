"""The nine tokens that a language model gains when it becomes the speaker of a chat model."""

from typing import Any

IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
SPECIAL_TOKENS = (  # in the order in which published checkpoints append them
    IMAGE_START, IMAGE_END, IMAGE_CONTEXT,
    "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>",
)  # fmt: skip


def add_special_tokens(tokenizer: Any) -> int:
    """Appends the tokens that a tokenizer lacks, in the published order.

    Args:
        tokenizer: one of transformers', changed in place. The embedding tables must then have at
            least `len(tokenizer)` rows.

    Returns:
        How many were new: 9 for the tokenizer of a plain language model, 0 for that of a chat
        checkpoint.

    Raises:
        TypeError: not a tokenizer that takes new tokens.
    """
    if not hasattr(tokenizer, "add_tokens") or not hasattr(tokenizer, "get_vocab"):
        raise TypeError(
            f"add_special_tokens: needs one of transformers' tokenizers, got "
            f"{type(tokenizer).__name__}"
        )
    known = tokenizer.get_vocab()
    missing = [token for token in SPECIAL_TOKENS if token not in known]
    return tokenizer.add_tokens(missing, special_tokens=True) if missing else 0
