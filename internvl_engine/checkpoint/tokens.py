"""Ids of added tokens, out of a tokenizer's files, without the tokenizer."""

from typing import Any

from .locate import Source

IMG_CONTEXT = "<IMG_CONTEXT>"  # the placeholder that features of images replace


def added_token_id(source: Source, token: str) -> int | None:
    """The id of a token that was added to a tokenizer; None where no file tells.

    tokenizer.json      {"added_tokens": [{"id": 151667, "content": "<IMG_CONTEXT>"}]}
    added_tokens.json   {"<IMG_CONTEXT>": 151667}
    tokenizer_config    {"added_tokens_decoder": {"151667": {"content": "<IMG_CONTEXT>"}}}

    Raises:
        CheckpointError: one of these files is damaged.
    """
    whole = source.json("tokenizer.json") or {}
    for each in _list(whole.get("added_tokens")):
        if isinstance(each, dict) and each.get("content") == token:
            return each.get("id")
    added = source.json("added_tokens.json") or {}
    if token in added:
        return added[token]
    decoder = (source.json("tokenizer_config.json") or {}).get("added_tokens_decoder")
    for number, each in (decoder if isinstance(decoder, dict) else {}).items():
        if isinstance(each, dict) and each.get("content") == token:
            return int(number)
    return None


def _list(value: Any) -> list:
    return value if isinstance(value, list) else []
