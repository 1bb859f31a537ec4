"""Weights in panels, the layout of csrc/cpu/linear.h, and the product with them.

A weight (F, C) is (F / rows, C / depth, rows, depth): panels of `rows` of its rows, cut into steps
of `depth` columns. Rows that fill no panel are followed by zeros.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ._epilogue import EPILOGUES, apply_epilogue, output_shape
from ._library import NATIVE_TYPES, address, native
from ._rows import as_rows


class Panel(NamedTuple):
    """How an instruction set lays a weight out; a word (`depth` values) has at most 64 bits."""

    rows: int
    depth: int

    def __str__(self) -> str:
        return f"panels-{self.rows}x{self.depth}"


@cache
def panel_of(dtype: torch.dtype) -> Panel | None:
    """The panels that the native kernels read here; None where they do not know the dtype."""
    if native is None or dtype not in NATIVE_TYPES:
        return None
    return Panel(*native.linear_panel(NATIVE_TYPES[dtype]))


def to_panels(weight: Tensor, panel: Panel) -> Tensor:
    """Packs (F, C), any strides, C a multiple of the depth, into memory of its own."""
    features, channels = weight.shape
    whole, steps = features // panel.rows, channels // panel.depth
    packed = weight.new_empty(-(-features // panel.rows), steps, *panel)
    words, weight = _as_words(packed), weight.contiguous()
    if weight.storage_offset() % panel.depth:  # a view as words must begin with one
        weight = weight.clone()
    rows = _as_words(weight.view(features, steps, panel.depth))
    words[:whole] = rows[: whole * panel.rows].view(whole, panel.rows, steps).transpose(1, 2)
    rest = features - whole * panel.rows
    if rest:
        words[-1] = 0
        words[-1, :, :rest] = rows[-rest:].t()
    return packed


def from_panels(packed: Tensor, features: int) -> Tensor:
    """The weight (F, C), bit for bit, in memory of its own; the shape says how it was packed."""
    panels, steps, rows, depth = packed.shape
    if torch.compiler.is_exporting():  # ONNX has no views of another dtype
        return packed.transpose(1, 2).reshape(panels * rows, -1)[:features].clone()
    words = _as_words(packed).transpose(1, 2)
    dense = words.clone(memory_format=torch.contiguous_format).view(packed.dtype)
    dense = dense.view(panels * rows, steps * depth)
    return dense if panels * rows == features else dense[:features].clone()


def _as_words(x: Tensor) -> Tensor:
    """(..., depth) as (...) of integers: PyTorch transposes those 1.5 times as fast as pairs."""
    if x.shape[-1] > 1:
        x = x.view({4: torch.int32, 8: torch.int64}[x.shape[-1] * x.itemsize])
    return x.squeeze(-1)


def check_panels(packed: Tensor) -> None:
    """Raises ValueError where a weight was packed for another instruction set."""
    needed, found = panel_of(packed.dtype), packed.shape[2:]
    if needed != found:
        raise ValueError(
            f"linear_packed: the weight is packed as {Panel(*found)}, but the kernels for "
            f"{native.instruction_set()} read {needed}: pack, or export, on the machine and with "
            "the INTERNVL_ISA under which it runs"
        )


def panel_product(
    x: Tensor, packed: Tensor, features: int, bias: Tensor | None = None, epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """residual + epilogue(x @ weight.T + bias); calls csrc/cpu/linear.h.

    x, packed and bias have one dtype. No bit of a row depends on the others.
    """
    shape = output_shape(x, features, epilogue)
    if epilogue == "swiglu" and shape[-1] % packed.shape[2]:  # a panel has rows of gate and up
        return apply_epilogue(panel_product(x, packed, features, bias), epilogue, residual)
    if residual is not None and residual.dtype != x.dtype:
        return panel_product(x, packed, features, bias, epilogue) + residual
    dtype, threads = NATIVE_TYPES[x.dtype], torch.get_num_threads()
    y = x.new_empty(shape)
    rows = y.numel() // max(shape[-1], 1)
    x_rows, bias = as_rows(x), None if bias is None else bias.contiguous()
    residual_rows = None if residual is None else as_rows(residual)
    size = native.linear_workspace(dtype, rows, x.shape[-1], threads)
    workspace = x.new_empty(size, dtype=torch.uint8)
    native.linear(
        dtype, x_rows.pointer(), packed.data_ptr(), address(bias),
        (0, 1, 0, 0) if residual_rows is None else residual_rows.pointer(), y.data_ptr(), rows,
        x.shape[-1], features, EPILOGUES.index(epilogue), workspace.data_ptr(), threads,
    )  # fmt: skip
    return y
