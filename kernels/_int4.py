"""Weights in 4 bits, in the panels that csrc/cpu/linear_int4.h reads: the same on every processor.

A weight (F, C) is two tensors:

    packed  uint8 (P, S, 32, 4): panels of 32 rows, P = ceil(F / 32), steps of 8 columns,
            S = ceil(C / 8). Byte j of a row and step holds column j of the step in its low half
            and column 4 + j in its high half. A half n means n - 8; absent rows and columns have 8.
    scales  float16 (P, G, 32), G = ceil(C / group): of each row and group of columns; they may be
            negative, and are 0 for absent rows.

value = (n - 8) * scale. 4.25 bits a weight in groups of 64, 4.125 in groups of 128.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._rounding import (
    inverse_factor,
    levels_of,
    nearest_steps,
    round_with_feedback,
    searched_steps,
)

PANEL_ROWS, STEP_COLUMNS = 32, 8
GROUPS = (64, 128)
ROUNDINGS = ("search", "nearest")
SLICE = 32768  # values that are rounded together
LARGEST = 8 * 65504  # levels below zero times the largest number of float16


def quantize_int4(
    weight: Tensor, group: int = 64, rounding: str = "search", importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A weight in 4 bits.

    Rows are rounded each by itself: what is quantized in parts is what is quantized whole.

    Args:
        weight: (F, C), floating, any strides.
        group: the columns that share a scale, 64 or 128.
        rounding: "search" looks for the scale of each group with the least squared error, "nearest"
            takes the one of the largest value; see _rounding.py.
        importance: (C,), by which squared errors are weighed in the search, as the mean squared
            activation of each column; None for all alike.

    Returns:
        packed, uint8 (P, S, 32, 4), and scales, float16 (P, G, 32); see this file's head.

    Raises:
        ValueError: another group or rounding, a weight that is not a floating matrix or has NaN,
            infinity or values too large for scales in float16, or an importance of another shape.
    """
    _check("quantize_int4", weight, group)
    rows, columns = weight.shape
    if rounding not in ROUNDINGS or (importance is not None and importance.shape != (columns,)):
        raise ValueError(
            f"quantize_int4: needs a rounding in {ROUNDINGS} and importance ({columns},) or None, "
            f"got {rounding!r} and {None if importance is None else tuple(importance.shape)}"
        )
    if importance is not None:
        padded = F.pad(importance.detach().float(), (0, -columns % group))
        importance = padded.view(1, -1, group).expand(PANEL_ROWS, -1, -1).reshape(-1, group)
    packed, scales = _empty(weight, group)
    for panel in range(len(packed)):
        values = weight.detach()[panel * PANEL_ROWS : (panel + 1) * PANEL_ROWS]
        missing = (0, -columns % group, 0, PANEL_ROWS - len(values))
        groups = F.pad(values.float(), missing).view(-1, group)
        levels, stored = _rounded(groups, rounding, importance)
        levels = levels.view(PANEL_ROWS, -1)
        packed[panel : panel + 1] = pack_int4(levels[:, : packed.shape[1] * STEP_COLUMNS])
        scales[panel] = stored.view(PANEL_ROWS, -1).t()
    return packed, _finite("quantize_int4", scales, weight)


def quantize_int4_calibrated(
    weight: Tensor, activations: Tensor, group: int = 64
) -> tuple[Tensor, Tensor]:
    """A weight in 4 bits whose product with such activations has the least error: error feedback.

    A few hundred rows are enough, from a few pictures and prompts. Takes 4/3 C^3 operations in
    float64, F C^2 in float32, and 24 C^2 + 12 F C bytes.

    Args:
        weight: (F, C), floating, any strides.
        activations: (..., C), what the layer was given.
        group: the columns that share a scale, 64 or 128.

    Returns:
        As `quantize_int4`.

    Raises:
        ValueError: as `quantize_int4`, or activations of another width or that are not finite.
    """
    _check("quantize_int4_calibrated", weight, group)
    rows, columns = weight.shape
    if activations.shape[-1:] != (columns,) or not bool(activations.isfinite().all()):
        raise ValueError(
            f"quantize_int4_calibrated: needs finite activations (..., {columns}), got "
            f"{tuple(activations.shape)}"
        )
    seen = F.pad(activations.detach().flatten(0, -2), (0, -columns % group))
    factor = inverse_factor(seen)
    padded = F.pad(weight.detach().float(), (0, -columns % group, 0, -rows % PANEL_ROWS))
    levels, steps = round_with_feedback(padded, factor, group, torch.float16)
    levels = levels[:, : -(-columns // STEP_COLUMNS) * STEP_COLUMNS]
    scales = steps.unflatten(0, (-1, PANEL_ROWS)).transpose(1, 2).contiguous()
    return pack_int4(levels), _finite("quantize_int4_calibrated", scales, weight)


def _rounded(
    groups: Tensor, rounding: str, importance: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Levels int8 of groups (N, group) and their steps float16 (N, 1).

    In slices that stay in cache, and that PyTorch leaves to one thread: waking others for each of
    some thirty small operations costs more than they save.
    """
    levels = torch.empty_like(groups, dtype=torch.int8)
    stored = groups.new_empty(len(groups), 1, dtype=torch.float16)
    for first in range(0, len(groups), SLICE // groups.shape[1]):
        some = slice(first, first + SLICE // groups.shape[1])
        if rounding == "nearest":
            steps = nearest_steps(groups[some])
        else:
            weights = None if importance is None else importance[some]
            steps = searched_steps(groups[some], weights)
        stored[some] = steps
        levels[some] = levels_of(groups[some], stored[some].float())
    return levels, stored


def _check(function: str, weight: Tensor, group: int) -> None:
    if group not in GROUPS or weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"{function}: needs a floating weight (F, C) and a group in {GROUPS}, got "
            f"{weight.dtype} of shape {tuple(weight.shape)} and {group}"
        )


def _finite(function: str, scales: Tensor, weight: Tensor) -> Tensor:
    if not bool(scales.isfinite().all()):
        largest = float(weight.detach().abs().max())
        if not math.isfinite(largest):
            raise ValueError(f"{function}: the weight has NaN or infinite values")
        raise ValueError(
            f"{function}: the weight has values up to {largest:.4g}, too large for a scale in "
            f"float16, which holds weights to about {LARGEST:,}; int8 and fp8 hold larger ones"
        )
    return scales


def _empty(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Memory for a weight of that shape in 4 bits."""
    rows, columns = weight.shape
    panels, steps = -(-rows // PANEL_ROWS), -(-columns // STEP_COLUMNS)
    return (
        weight.new_empty(panels, steps, PANEL_ROWS, STEP_COLUMNS // 2, dtype=torch.uint8),
        weight.new_empty(panels, -(-columns // group), PANEL_ROWS, dtype=torch.float16),
    )


def pack_int4(levels: Tensor) -> Tensor:
    """Whole panels and steps of levels, int8 (P * 32, S * 8) in [-8, 7], as uint8 (P, S, 32, 4)."""
    panels, steps = len(levels) // PANEL_ROWS, levels.shape[1] // STEP_COLUMNS
    halves = (levels + 8).to(torch.uint8).reshape(panels, PANEL_ROWS, steps, 2, 4)
    both = halves[:, :, :, 0] | (halves[:, :, :, 1] << 4)
    return both.transpose(1, 2).contiguous()


def dequantize_int4(
    packed: Tensor, scales: Tensor, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """The values (rows, columns) of a weight in 4 bits, rounded once to `dtype`."""
    group, panels = group_of(packed, scales, columns), len(packed)
    halves = torch.stack((packed & 15, packed >> 4), 3).transpose(1, 2)  # (P, 32, S, 2, 4)
    levels = halves.reshape(panels * PANEL_ROWS, packed.shape[1] * STEP_COLUMNS)
    levels = levels[:rows, :columns].float().sub_(8)
    steps = scales.transpose(1, 2).reshape(panels * PANEL_ROWS, scales.shape[1])[:rows].float()
    return levels.mul_(steps.repeat_interleave(group, 1)[:, :columns]).to(dtype)


def group_of(packed: Tensor, scales: Tensor, columns: int) -> int:
    """The columns that share a scale, of a weight with that many columns.

    Raises:
        ValueError: tensors that are not a weight in 4 bits of so many columns.
    """
    fits = packed.dim() == 4 and scales.dim() == 3 and packed.shape[2:] == (PANEL_ROWS, 4)
    fits = fits and (packed.dtype, scales.dtype) == (torch.uint8, torch.float16)
    fits = fits and packed.shape[1] == -(-columns // STEP_COLUMNS)
    fits = fits and (scales.shape[0], scales.shape[2]) == (packed.shape[0], PANEL_ROWS)
    for group in GROUPS:
        if fits and scales.shape[1] == -(-columns // group):
            return group
    raise ValueError(
        f"int4: a weight of {columns} columns has uint8 (P, {-(-columns // STEP_COLUMNS)}, "
        f"{PANEL_ROWS}, 4) and float16 scales (P, groups of {GROUPS} columns, {PANEL_ROWS}), got "
        f"{packed.dtype} {tuple(packed.shape)} and {scales.dtype} {tuple(scales.shape)}"
    )
