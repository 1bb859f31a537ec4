"""Placeholders in a prompt and the features that replace them.

All tiles of a batch come in one tensor, and their features fill the positions whose id is the
placeholder's from left to right, row after row. A count that does not match is an error: published
code goes on with the features it has.
"""

from typing import Any

import torch
from torch import Tensor


def check_prompts(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
    """Raises a ValueError where prompts are missing, or have not the shape of a batch."""
    if input_ids is None and inputs_embeds is None:
        raise ValueError("VisionLanguageModel: give input_ids or inputs_embeds")
    if input_ids is not None and (input_ids.ndim != 2 or input_ids.is_floating_point()):
        raise ValueError(
            f"VisionLanguageModel: input_ids must be integers of shape (batch, tokens), got "
            f"{input_ids.dtype} of shape {tuple(input_ids.shape)}"
        )
    if inputs_embeds is None:
        return
    if inputs_embeds.ndim != 3 or (
        input_ids is not None and inputs_embeds.shape[:2] != input_ids.shape
    ):
        of = "" if input_ids is None else f" of input_ids of shape {tuple(input_ids.shape)}"
        raise ValueError(
            f"VisionLanguageModel: inputs_embeds must be (batch, tokens, width){of}, got shape "
            f"{tuple(inputs_embeds.shape)}"
        )


def find_placeholders(input_ids: Tensor | None, placeholder_id: int | None, rows: int) -> Tensor:
    """Where the placeholders are, (B, L) bool.

    Args:
        input_ids: (B, L).
        placeholder_id: None where nobody has said it.
        rows: of the embedding table.

    Raises:
        ValueError: there are no ids, the placeholder's is not known, or the table has no such row.
    """
    if input_ids is None:
        raise ValueError("VisionLanguageModel: tiles need input_ids, which say where they belong")
    if placeholder_id is None:
        raise ValueError(
            "VisionLanguageModel: set model.img_context_token_id to the tokenizer's id of "
            "<IMG_CONTEXT>, which the tiles replace"
        )
    if not 0 <= placeholder_id < rows:
        raise ValueError(
            f"VisionLanguageModel: img_context_token_id is {placeholder_id}, but the language "
            f"model has {rows} embeddings: resize_token_embeddings(len(tokenizer)) adds them"
        )
    return input_ids == placeholder_id


def used_tiles(image_flags: Any, tiles: int) -> Tensor | None:
    """Which tiles are used, (tiles,) bool; None is all.

    Args:
        image_flags: (tiles,) or (tiles, 1), a tensor or numbers, 1 for tiles that fill
            placeholders; None is all of them. A tile with 0 belongs to a row of text only, where
            training needs one.

    Raises:
        ValueError: their number is another.
    """
    if image_flags is None:
        return None
    if not isinstance(image_flags, Tensor):
        image_flags = torch.tensor(image_flags, dtype=torch.int64, device="cpu")
    flags = image_flags.reshape(-1)
    if flags.shape[0] != tiles:
        raise ValueError(
            f"image_flags must have one flag for each of {tiles} tiles, got shape "
            f"{tuple(image_flags.shape)}"
        )
    return flags == 1


def tokens_of_features(features: Tensor, width: int) -> int:
    """Tokens a tile of features (tiles, tokens, width); a ValueError for another shape."""
    if features.ndim != 3 or features.shape[-1] != width:
        raise ValueError(
            f"VisionLanguageModel: visual_features must be (tiles, tokens, {width}), got shape "
            f"{tuple(features.shape)}"
        )
    return features.shape[1]


def check_count(placeholders: Tensor, tiles: int, tokens: int, placeholder_id: Any) -> None:
    """Compares the number of placeholders with that of the features that are to replace them.

    Args:
        placeholders: bool, of any shape.
        tiles: that are used, of `tokens` features each.
        placeholder_id: for the message.

    Raises:
        ValueError: they differ.
    """
    found = int(placeholders.sum())
    if found != tiles * tokens:
        raise ValueError(
            f"the prompts have {found} placeholders (id {placeholder_id}), but {tiles} tiles of "
            f"{tokens} tokens make {tiles * tokens} features"
        )


def fill(embeds: Tensor, placeholders: Tensor, features: Tensor) -> Tensor:
    """embeds with features at the placeholders.

    Where there is none, the features still get a gradient, of zeros: in distributed training every
    process must have one of every weight.

    Args:
        embeds: (B, L, C).
        placeholders: (B, L) bool, as many True as there are features.
        features: (tiles, tokens, C), cast to the dtype of embeds.
    """
    mask = placeholders.to(embeds.device).unsqueeze(-1)
    return torch.masked_scatter(embeds, mask, features.to(embeds.device, embeds.dtype))
