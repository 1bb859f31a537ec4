"""Weights in 4 bits, in the panels that csrc/cpu/linear_int4.h reads: the same on every processor.

A weight (F, C) is two tensors:

    packed  uint8 (P, S, 32, 4): panels of 32 rows, P = ceil(F / 32), steps of 8 columns,
            S = ceil(C / 8). Byte j of a row and step holds column j of the step in its low half
            and column 4 + j in its high half. A half n means n - 8; absent rows and columns have 8.
    scales  float16 (P, G, 32), G = ceil(C / group): of each row and group of columns; they may be
            negative, and are 0 for absent rows.

value = (n - 8) * scale. 4.25 bits a weight in groups of 64, 4.125 in groups of 128.
"""

import torch
from torch import Tensor

PANEL_ROWS, STEP_COLUMNS = 32, 8
GROUPS = (64, 128)


def quantize_int4(weight: Tensor, group: int = 64) -> tuple[Tensor, Tensor]:
    """A weight in 4 bits, each value rounded to the nearest.

    Args:
        weight: (F, C), floating, any strides.
        group: the columns that share a scale, 64 or 128.

    Returns:
        packed, uint8 (P, S, 32, 4), and scales, float16 (P, G, 32); see this file's head.

    Raises:
        ValueError: another group, or a weight that is not a floating matrix, or whose values are
            not finite in float16.
    """
    if group not in GROUPS or weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"quantize_int4: needs a floating weight (F, C) and a group in {GROUPS}, got "
            f"{weight.dtype} of shape {tuple(weight.shape)} and {group}"
        )
    rows, columns = weight.shape
    padded = weight.detach().float()
    padded = torch.nn.functional.pad(padded, (0, -columns % group, 0, -rows % PANEL_ROWS))
    grouped = padded.unflatten(1, (-1, group))
    low, high = grouped.aminmax(dim=2)
    scales = (torch.where(high > -low, high, low) / -8).half()
    step = scales.float().unsqueeze(2)
    levels = torch.where(step == 0, 0, grouped / step).round_().clamp_(-8, 7)
    if not bool(scales.isfinite().all()):
        raise ValueError("quantize_int4: the weight has values that are not finite in float16")
    levels = levels.to(torch.int8).flatten(1)[:, : -(-columns // STEP_COLUMNS) * STEP_COLUMNS]
    return pack_int4(levels), scales.unflatten(0, (-1, PANEL_ROWS)).transpose(1, 2).contiguous()


def pack_int4(levels: Tensor) -> Tensor:
    """Whole panels and steps of levels, int8 (P * 32, S * 8) in [-8, 7], as uint8 (P, S, 32, 4)."""
    halves = (levels + 8).to(torch.uint8).view(-1, PANEL_ROWS, levels.shape[1] // 8, 2, 4)
    both = halves[:, :, :, 0] | (halves[:, :, :, 1] << 4)
    return both.transpose(1, 2).contiguous()


def dequantize_int4(
    packed: Tensor, scales: Tensor, rows: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """The values (rows, columns) of a weight in 4 bits, rounded once to `dtype`."""
    group = group_of(packed, scales, columns)
    halves = torch.stack((packed & 15, packed >> 4), 3).transpose(1, 2)  # (P, 32, S, 2, 4)
    levels = halves.reshape(-1, packed.shape[1] * STEP_COLUMNS)[:rows, :columns].float() - 8
    steps = scales.transpose(1, 2).reshape(-1, scales.shape[1])[:rows].float()
    whole = steps.repeat_interleave(group, 1)[:, :columns]
    return (levels * whole).to(dtype)


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
