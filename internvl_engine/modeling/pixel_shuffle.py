"""From patches to the language model's width: pixel shuffle and projector.

Pixel shuffle: blocks of r x r patches become one token of r * r times the width.

v2: token R * (P / r) + T of block (R, T);  its channel (r * i + j) * D + d is patch
    (r * R + i, r * T + j), channel d
v1: token T * (P / r) + R: the tokens are transposed, their channels are not

P patches a side, D width. Source: OpenGVLab/InternVL, modeling_internvl_chat.py.
"""

import math
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN


def pixel_shuffle(states: Tensor, factor: int, version: str) -> Tensor:
    """(tiles, P * P, D), row after row, to (tiles, (P / r)**2, r * r * D).

    Args:
        factor: r, patches of a side that become one token.
        version: "v1" or "v2".

    Raises:
        ValueError: the patches are no square whose side is a multiple of r.
    """
    tiles, patches, width = states.shape
    side = math.isqrt(patches)
    if side * side != patches or side % factor:
        raise ValueError(
            f"pixel_shuffle: needs a square of patches whose side is a multiple of {factor}, got "
            f"{patches} patches"
        )
    blocks = side // factor
    grid = states.reshape(tiles, blocks, factor, blocks, factor, width)  # (tiles, R, i, T, j, D)
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    return grid.permute(order).reshape(tiles, blocks * blocks, factor * factor * width)


def tokens_of_tiles(pixel_values: Tensor, patch_size: int, factor: int) -> int:
    """Tokens that each of these tiles becomes.

    Args:
        pixel_values: (tiles, 3, side, side).
        patch_size: side of a patch, in pixels.
        factor: r, patches of a side that become one token.

    Raises:
        ValueError: they are no such tiles, or their side is no multiple of both.
        TypeError: they are integers.
    """
    shape, step = tuple(pixel_values.shape), patch_size * factor
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3] or shape[2] % step or not shape[2]:
        raise ValueError(
            f"VisionLanguageModel: pixel_values must be (tiles, 3, side, side), side a multiple of "
            f"{step} (patches of {patch_size}, {factor} a side to a token), got shape {shape}"
        )
    if not pixel_values.is_floating_point():
        raise TypeError(
            f"VisionLanguageModel: pixel_values must be normalised floating-point values, got "
            f"{pixel_values.dtype}"
        )
    return (shape[2] // step) ** 2


def projector(config: Any) -> nn.Sequential:
    """LayerNorm, linear, activation, linear: r * r * D of the vision tower to C.

    Args:
        config: VisionLanguageConfig.
    """
    width = config.vision_config.hidden_size * config.shuffle_factor**2
    hidden = config.llm_config.hidden_size
    act = config.projector_hidden_act
    return nn.Sequential(
        nn.LayerNorm(width, eps=1e-5),
        nn.Linear(width, hidden),
        nn.GELU() if act == "gelu" else ACT2FN[act],
        nn.Linear(hidden, hidden),
    )
