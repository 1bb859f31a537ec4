"""Text from outside made fit for a message: one line, bounded, without control characters."""

import os
import unicodedata
from typing import Any

LIMIT = 120  # characters
UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}  # controls, halves of surrogate pairs, ends of lines
DIRECTIONS = set("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(value: Any, limit: int | None = LIMIT) -> str:
    """A name, a path or any other text as a message can show it.

    Args:
        value: a string, a path, or anything that `str` takes.
        limit: the most characters; a longer text loses its middle. None keeps everything.

    Returns:
        One line. Control characters, which a terminal would obey, and characters that change the
        direction of writing are escaped as in a Python string.
    """
    text = os.fsdecode(value) if isinstance(value, bytes | os.PathLike) else str(value)
    if limit is not None and len(text) > limit:
        head = limit // 2
        text = f"{text[:head]}...{text[head + 3 - limit :]}"
    if text.isprintable():
        return text
    return "".join(repr(c)[1:-1] if _is_unprintable(c) else c for c in text)


def _is_unprintable(character: str) -> bool:
    return character in DIRECTIONS or unicodedata.category(character) in UNPRINTABLE
