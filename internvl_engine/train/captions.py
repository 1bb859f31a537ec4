"""Training samples: the texts of captioned images as ids, masks and labels of three losses."""

import re
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..processing.padding import TokenBatch, pad_rows
from ..processing.text import (
    CAPTION_PROMPT,
    EMBEDDING_PREFIX,
    MAX_LENGTH,
    InternVLTokenizer,
)

MAX_WORDS = 50
IGNORED = -100  # the label that cross entropy leaves out


def clean_caption(caption: str, max_words: int = MAX_WORDS) -> str:
    """Normalises a caption as the published fine-tuning data does.

    Lower case; each of . ! " ( ) * # : ; ~ becomes a space; two or more white-space characters
    become one space; no space at either end; at most `max_words` words between single spaces.

    Args:
        caption: any text.
        max_words: how many words are kept.
    """
    caption = re.sub(r'[.!"()*#:;~]', " ", caption.lower())
    caption = re.sub(r"\s{2,}", " ", caption).rstrip("\n").strip(" ")
    return " ".join(caption.split(" ")[:max_words])


def encode_for_training(
    tokenizer: InternVLTokenizer,
    captions: Sequence[str],
    negatives: Sequence[str],
    *,
    max_length: int = MAX_LENGTH,
    prompt: str = CAPTION_PROMPT,
    labels: Literal["published", "fixed"] = "published",
    clean: bool = True,
) -> dict[str, Tensor]:
    """Texts of B captioned images for the matching, contrastive and captioning losses.

    Args:
        tokenizer: gives ids and the training padding `[PAD]`, which goes on the right.
        captions: B captions, each of its image.
        negatives: B captions of other images.
        max_length: L of every result.
        prompt: what the caption continues in the captioning loss.
        labels: "fixed" scores the caption and `</s>` only; "published" scores the prompt's last
            token (":") too, as the published labels do (they mask 4 of the 5 prompt ids).
        clean: pass both through `clean_caption` first.

    Returns:
        (B, L) int64 tensors: `positive_*`, `negative_*`, `summarize_*` and the captioning ones
        without a prefix, each as `input_ids` and `attention_mask`; and `labels`, -100 on padding
        and prompt.

    Raises:
        ValueError: the two lists differ in length, unknown `labels`, or a prompt that fills L.
    """
    if isinstance(captions, str) or isinstance(negatives, str):
        raise TypeError("encode_for_training: needs lists of captions, got one string")
    if len(captions) != len(negatives):
        raise ValueError(
            f"encode_for_training: {len(captions)} captions but {len(negatives)} negatives"
        )
    if labels not in ("published", "fixed"):
        raise ValueError(
            f'encode_for_training: labels must be "published" or "fixed", got {labels!r}'
        )
    if clean:
        captions = [clean_caption(caption) for caption in captions]
        negatives = [clean_caption(caption) for caption in negatives]
    prefix = tokenizer.encode(prompt)[0]
    room = max_length - len(prefix) + 1  # the caption's own <s> is dropped
    if room < 2:
        raise ValueError(
            f"encode_for_training: max_length {max_length} has no room after the prompt's "
            f"{len(prefix)} ids"
        )
    rows = {
        "positive_": tokenizer.encode(captions, eos=True, max_length=max_length),
        "negative_": tokenizer.encode(negatives, eos=True, max_length=max_length),
        "summarize_": tokenizer.encode(
            captions, prefix=EMBEDDING_PREFIX, eos=True, max_length=max_length
        ),
        "": [prefix + r[1:] for r in tokenizer.encode(captions, eos=True, max_length=room)],
    }
    batch: dict[str, Tensor] = {}
    for name, texts in rows.items():
        padded = pad_rows(texts, "right", "max_length", max_length, tokenizer.training_pad_token_id)
        batch[f"{name}input_ids"], batch[f"{name}attention_mask"] = padded
    unscored = len(prefix) - (labels == "published")
    batch["labels"] = _labels(TokenBatch(batch["input_ids"], batch["attention_mask"]), unscored)
    return batch


def _labels(texts: TokenBatch, unscored: int) -> Tensor:
    """The ids as targets: -100 on padding and on the first `unscored` positions."""
    ids, mask = texts
    skip = (mask == 0) | (
        torch.arange(ids.shape[1], dtype=torch.int64, device=ids.device) < unscored
    )
    return ids.masked_fill(skip, IGNORED)
