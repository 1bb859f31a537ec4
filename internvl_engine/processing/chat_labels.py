"""What is learned of a conversation: the answers and what ends them.

The assistant's texts are marked when the prompt is rendered, and the marks taken out again here.
"""

import re
from collections.abc import Callable, Sequence

ANSWER, ANSWER_END = "\ufdd2", "\ufdd3"  # around what is learned; no text has these code points
IGNORED = -100


def labelled(
    marked: str, ids_of: Callable[[str], list[int]], separator: str
) -> tuple[list[int], list[int]]:
    """Ids of a prompt with marks, and its labels: the answers and what ends them, else -100.

    A tokenizer need not split where an answer begins: a token that is partly answer is learned.

    Args:
        marked: the prompt, with `ANSWER` and `ANSWER_END` around what is learned.
        ids_of: the tokenizer.
        separator: what ends an answer.
    """
    text, spans = "", []
    for piece in re.split(f"({ANSWER}.*?{ANSWER_END})", marked, flags=re.DOTALL):
        if piece.startswith(ANSWER):
            spans.append([len(text), len(text) + len(piece) - 2])
            piece = piece[1:-1]
        elif spans and piece.startswith(separator):
            spans[-1][1] += len(separator)
        text += piece
    ids = ids_of(text)
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        first, last = (_agreeing(ids, ids_of(text[:place])) for place in (start, end))
        labels[first:last] = ids[first:last]
    return ids, labels


def _agreeing(ids: Sequence[int], beginning: Sequence[int]) -> int:
    """How many ids at the beginning are those of another row."""
    pairs = enumerate(zip(ids, beginning, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ids), len(beginning)))
