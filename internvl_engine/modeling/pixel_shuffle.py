"""Pixel shuffle: blocks of r x r patches become one token of r * r times the width.

v2: token R * (P / r) + T of block (R, T);  its channel (r * i + j) * D + d is patch
    (r * R + i, r * T + j), channel d
v1: token T * (P / r) + R: the tokens are transposed, their channels are not

P patches a side, D width. Source: OpenGVLab/InternVL, modeling_internvl_chat.py.
"""

import math

from torch import Tensor


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
