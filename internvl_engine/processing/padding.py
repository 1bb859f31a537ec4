"""Which side the padding of a token batch is on, checked instead of assumed.

A text embedding is the state of the last real token, so it needs padding on the right; decoding
continues after the last position, so it needs padding on the left. The wrong side raises nothing
in the model and gives plausible wrong numbers: LLaMA tokenizers of transformers 5 pad left by
default. Shapes: input_ids (B, L) integers, attention_mask (B, L) with 1 for real tokens.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Padding = Literal["longest", "max_length", False]


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
        padding: to the longest row, to `max_length`, or False for lists as they are.
        max_length: L for `padding="max_length"`.
        pad_token_id: the padding.

    Returns:
        TokenBatch of (B, L) int64 tensors; L is 0 for no rows.

    Raises:
        ValueError: an unknown `padding`, or a `max_length` that a row does not fit in.
    """
    if padding not in ("longest", "max_length", False):
        raise ValueError(f'padding must be "longest", "max_length" or False, got {padding!r}')
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


def mask_from_ids(input_ids: Tensor, pad_token_id: int = 0) -> Tensor:
    """Attention mask of a right-padded batch whose mask was not kept.

    Everything after the last token that is not padding is padding. An id 0 in the middle of a
    sentence (an unknown piece has the id of the padding) stays real, which `ids > 0` gets wrong.

    Args:
        input_ids: (B, L) integers, padded on the right.
        pad_token_id: the padding id.

    Returns:
        (B, L) int64 mask, 1 for real tokens.
    """
    real = _rows("mask_from_ids", input_ids) != pad_token_id
    return real.flip(1).long().cummax(dim=1).values.flip(1) if real.shape[1] else real.long()


def last_token_index(attention_mask: Tensor) -> Tensor:
    """Position of the last real token of every row.

    Args:
        attention_mask: (B, L), 1 for real tokens, padded on either side.

    Returns:
        (B,) int64.

    Raises:
        ValueError: a row has no real token at all.
    """
    real = _rows("last_token_index", attention_mask) != 0
    if not bool(real.any(dim=1).all()):
        empty = int((~real.any(dim=1)).nonzero()[0])
        raise ValueError(f"last_token_index: row {empty} of the attention mask has no real token")
    positions = torch.arange(real.shape[1], device=real.device)
    return (positions * real).amax(dim=1) if real.numel() else positions.new_zeros(real.shape[0])


def check_right_padded(
    input_ids: Tensor, attention_mask: Tensor | None = None, eos_token_id: int | None = None
) -> Tensor:
    """Checks that a batch can be embedded, and returns its mask.

    Args:
        input_ids: (B, L) integers.
        attention_mask: (B, L) of 0 and 1 (or bool); None derives it with `mask_from_ids`.
        eos_token_id: the id that must end every row; None leaves that unchecked.

    Returns:
        (B, L) int64 mask.

    Raises:
        ValueError: the shapes differ, the mask is not 0 and 1, a row has no real token, has
            padding before a real token, or does not end in `eos_token_id`. Any of these would
            read the embedding from a wrong position without a word.
    """
    name = "check_right_padded"
    mask = mask_from_ids(input_ids) if attention_mask is None else attention_mask
    if _rows(name, input_ids).shape != mask.shape:
        raise ValueError(
            f"{name}: input_ids are {tuple(input_ids.shape)}, attention_mask {tuple(mask.shape)}; "
            "they must be the same shape"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"{name}: the attention mask must hold only 0 and 1")
    mask = mask.long()
    last = last_token_index(mask)
    _check_no_gap(input_ids, mask, last, guessed=attention_mask is None)
    if eos_token_id is not None and mask.shape[0]:
        ends = input_ids.gather(1, last[:, None].long())[:, 0]
        wrong = (ends != eos_token_id).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"{name}: row {row} ends in id {int(ends[row])} at position {int(last[row])}, not "
                f"in the end-of-sentence id {eos_token_id} that embeddings are read from; encode "
                "with InternVLTokenizer.encode_for_embedding, and pass its attention mask"
            )
    return mask


def repad_left(
    input_ids: Tensor, attention_mask: Tensor, pad_token_id: int = 0
) -> tuple[Tensor, Tensor]:
    """Moves every row's padding to its left side and keeps the order of its real tokens.

    A batch that is already padded on the left comes back unchanged (same values).

    Args:
        input_ids: (B, L) integers, padded anywhere.
        attention_mask: (B, L), 1 for real tokens.
        pad_token_id: written into every padded position.

    Returns:
        (input_ids, attention_mask) of the same shapes and dtypes.

    Raises:
        ValueError: the shapes differ.
    """
    if _rows("repad_left", input_ids).shape != attention_mask.shape:
        raise ValueError(
            f"repad_left: input_ids are {tuple(input_ids.shape)}, attention_mask "
            f"{tuple(attention_mask.shape)}; they must be the same shape"
        )
    real = attention_mask != 0
    order = real.long().argsort(dim=1, stable=True)  # zeros first, both kinds in their order
    mask = attention_mask.gather(1, order)
    return input_ids.gather(1, order).masked_fill(mask == 0, pad_token_id), mask


def _rows(name: str, values: Tensor) -> Tensor:
    if values.ndim != 2:
        raise ValueError(f"{name}: needs a batch of rows (B, L), got shape {tuple(values.shape)}")
    return values


def _check_no_gap(input_ids: Tensor, mask: Tensor, last: Tensor, guessed: bool) -> None:
    """Raises where a row has padding before its last real token."""
    lengths = mask.sum(dim=1)
    if guessed:  # the guess has no gaps by construction: leading pads are what a gap looks like
        lengths = torch.where(input_ids[:, :1].sum(dim=1) == 0, -1, lengths)
    wrong = (lengths != last + 1).nonzero()
    if len(wrong):
        raise ValueError(
            f"check_right_padded: row {int(wrong[0])} has padding before a real token; text "
            "embeddings need padding on the right (LLaMA tokenizers of transformers 5 pad left by "
            "default). Encode with InternVLTokenizer.encode_for_embedding"
        )
