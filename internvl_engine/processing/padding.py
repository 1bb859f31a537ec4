"""Batches of token ids with their masks, padded on the side that their use needs.

A text embedding is the state of the last real token and needs padding on the right; decoding goes
on after the last position and needs padding on the left. The wrong side gives plausible wrong
numbers: `model.encode_text` warns of it, `model.generate` puts it right.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch

Padding = Literal["longest", "max_length", True, False]


class TokenBatch(NamedTuple):
    """Token ids and the mask of the real ones.

    input_ids: (B, L) int64, or lists of different lengths where no padding was asked for.
    attention_mask: the same, 1 for real tokens.
    """

    input_ids: Any
    attention_mask: Any


def pad_rows(
    rows: Sequence[Sequence[int]],
    side: Literal["left", "right"],
    padding: Padding = "longest",
    max_length: int | None = None,
    pad_token_id: int = 0,
) -> TokenBatch:
    """Makes a batch of rows of ids of different lengths.

    Args:
        rows: token ids.
        side: where the padding goes.
        padding: to the longest row (True is the same), to `max_length`, or False for lists as
            they are.
        max_length: L for `padding="max_length"`.
        pad_token_id: the padding.

    Returns:
        TokenBatch of (B, L) int64 tensors; L is 0 for no rows.

    Raises:
        ValueError: an unknown `padding`, or a `max_length` that a row does not fit in.
    """
    if padding not in ("longest", "max_length", True, False):
        raise ValueError(f'padding must be "longest", "max_length", True or False, got {padding!r}')
    if padding is False:
        return TokenBatch([list(row) for row in rows], [[1] * len(row) for row in rows])
    length = max((len(row) for row in rows), default=0)
    if padding == "max_length":
        if max_length is None or max_length < length:
            raise ValueError(
                f'padding="max_length" needs a max_length of {length} or more, got {max_length}'
            )
        length = max_length
    ids = torch.full((len(rows), length), pad_token_id, dtype=torch.int64, device="cpu")
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        real = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[index, real] = torch.tensor(row, dtype=torch.int64, device="cpu")
        mask[index, real] = 1
    return TokenBatch(ids, mask)
