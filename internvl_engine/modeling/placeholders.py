"""Placeholders in a prompt and the features that replace them.

All tiles of a batch come in one tensor, and their features fill the positions whose id is the
placeholder's from left to right, row after row. A count that does not match is an error: published
code goes on with the features it has.
"""

import torch
from torch import Tensor


def used_tiles(image_flags: Tensor | None, tiles: int) -> Tensor | None:
    """Which tiles are used, (tiles,) bool; None is all.

    Args:
        image_flags: (tiles,) or (tiles, 1), 1 for tiles that fill placeholders; None is all of
            them. A tile with 0 belongs to a row of text only, where training needs one.

    Raises:
        ValueError: their number is another.
    """
    if image_flags is None:
        return None
    flags = image_flags.reshape(-1)
    if flags.shape[0] != tiles:
        raise ValueError(
            f"image_flags must have one flag for each of {tiles} tiles, got shape "
            f"{tuple(image_flags.shape)}"
        )
    return flags == 1


def check_count(placeholders: Tensor, tiles: int, tokens: int, placeholder_id: int) -> None:
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
