"""Weights of 8 bits: how they are rounded and laid out; the product is in linear_int8.py.

    weight[f, c] = q[f, c] * scales[f]      q in [-127, 127], scales[f] = max |weight[f]| / 127

A weight (F, C) is (P, S, 32, 4): P = ceil(F / 32) panels of 32 rows, cut into S = ceil(C / 4) steps
of 4 columns, absent rows and columns 0. Four columns are what one instruction multiplies in a lane
(vpdpbusd). Unlike the wide panels of _panels.py the layout is the same on every processor, so that
a checkpoint is mapped wherever it is read. `sums` is the sum of each row's q: the instruction takes
unsigned activations, q + 128, and 128 * sums is what that adds.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PANEL_ROWS, STEP_COLUMNS = 32, 4
LARGEST = 127  # -128 is not used: symmetric
ROWS_AT_A_TIME = 1024  # whole panels: a weight is never whole in float32


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds every row of a weight to 255 levels of its own.

    Args:
        weight: (F, C), floating, any strides.

    Returns:
        packed int8 (P, S, 32, 4), scales float32 (F,) and sums int32 (F,), see above.

    Raises:
        ValueError: not a floating matrix, or one with NaN or infinity.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"quantize_int8: needs a floating weight (F, C), got {weight.dtype} of shape "
            f"{tuple(weight.shape)}"
        )
    features, channels = weight.shape
    packed = weight.new_empty(packed_shape(features, channels), dtype=torch.int8)
    scales = weight.new_empty(features, dtype=torch.float32)
    sums = weight.new_empty(features, dtype=torch.int32)
    for first in range(0, features, ROWS_AT_A_TIME):
        rows = slice(first, first + ROWS_AT_A_TIME)
        q, scales[rows] = _rounded(weight.detach()[rows].float())
        sums[rows] = q.sum(1, dtype=torch.int32)
        panels = packed[first // PANEL_ROWS : (first + ROWS_AT_A_TIME) // PANEL_ROWS]
        q = F.pad(q, (0, -channels % STEP_COLUMNS, 0, -len(q) % PANEL_ROWS))
        steps = packed.shape[1]
        panels.transpose(1, 2).copy_(q.view(len(panels), PANEL_ROWS, steps, STEP_COLUMNS))
    return packed, scales, sums


def _rounded(wide: Tensor) -> tuple[Tensor, Tensor]:
    """The levels, int8, of float32 rows, and the scale of each."""
    scales = wide.abs().amax(1) / LARGEST if wide.shape[1] else wide.new_zeros(len(wide))
    if not bool(scales.isfinite().all()):
        raise ValueError("quantize_int8: the weight has NaN or infinite values")
    divisors = torch.where(scales > 0, scales, 1.0)  # a row of zeros stays so
    q = (wide / divisors[:, None]).round_().clamp_(-LARGEST, LARGEST)
    return q.to(torch.int8), scales


def dequantize_int8(packed: Tensor, scales: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight (F, columns) that a packed one stands for, in memory of its own.

    Args:
        packed: int8 (P, S, 32, 4).
        scales: float32 (F,).
        columns: C.
        dtype: of the result, to which the products q * scale are rounded once.

    Raises:
        ValueError: shapes that do not go together.
    """
    check_int8("dequantize_int8", packed, scales.shape[0], columns)
    q = rows_of_int8(packed, scales.shape[0])[:, :columns]
    return (q * scales[:, None]).to(dtype, copy=False)


def packed_shape(features: int, columns: int) -> tuple[int, int, int, int]:
    """(P, S, 32, 4) of a weight (features, columns)."""
    return -(-features // PANEL_ROWS), -(-columns // STEP_COLUMNS), PANEL_ROWS, STEP_COLUMNS


def rows_of_int8(packed: Tensor, features: int) -> Tensor:
    """q (features, S * 4) row by row, in memory of its own."""
    panels, steps = packed.shape[:2]
    words = packed.contiguous().view(torch.int32).view(panels, steps, PANEL_ROWS)
    # contiguous() would leave a single step where it is, with a stride that bytes cannot have.
    words = words.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return words.view(panels * PANEL_ROWS, steps).view(torch.int8)[:features]


def check_int8(operator: str, packed: Tensor, features: int, columns: int) -> None:
    """Raises ValueError where `packed` is not a weight (features, columns)."""
    shape = packed_shape(features, columns)
    if packed.dtype != torch.int8 or packed.shape != shape:
        raise ValueError(
            f"{operator}: a weight ({features}, {columns}) is packed as torch.int8 of shape "
            f"{shape}, got {packed.dtype} of shape {tuple(packed.shape)}"
        )
