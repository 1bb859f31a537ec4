"""A weight of 4 bits with a scale a group of columns: see kernels/linear_int4.py."""

from typing import Any

import torch
from torch import Tensor

from .. import kernels
from .quantized import PANEL_ROWS, Layout, QuantizedTensor, rows_of_panels

GROUPS = (64, 128)


class Int4Tensor(QuantizedTensor):
    """A weight (F, C): packed uint8 (P, S, 32, 4), scales float16 (P, G, 32)."""

    FORM = "int4"
    INNER = ("packed", "scales")
    ROWS = PANEL_ROWS

    scales: Tensor

    @classmethod
    def inner_layouts(cls, shape: tuple[int, ...]) -> list[Layout]:
        return [cls.inner_layout(shape, group=group) for group in GROUPS]

    @classmethod
    def inner_layout(cls, shape: tuple[int, ...], group: int = 64) -> Layout:  # type: ignore[override]
        rows, columns = shape
        panels = -(-rows // PANEL_ROWS)
        return {
            "packed": ((panels, -(-columns // 8), PANEL_ROWS, 4), torch.uint8),
            "scales": ((panels, -(-columns // group), PANEL_ROWS), torch.float16),
        }

    @classmethod
    def _quantize(cls, weight: Tensor, group: int = 64) -> Any:  # type: ignore[override]
        return kernels.quantize_int4(weight, group)

    @classmethod
    def calibrated(cls, weight: Tensor, activations: Tensor, group: int = 64) -> "Int4Tensor":
        """The values whose products with such activations (..., C) are nearest to the weight's."""
        with torch.inference_mode(False), torch.no_grad():
            inner = kernels.quantize_int4_calibrated(weight.detach(), activations, group)
        return cls(*inner, weight.shape, weight.dtype)

    @property
    def options(self) -> dict[str, Any]:
        """The group, as the shape of the scales says."""
        groups, columns = self.scales.shape[1], self.shape[1]
        return {"group": next(size for size in GROUPS if -(-columns // size) == groups)}

    def dense(self) -> Tensor:
        rows, columns = self.shape
        return kernels.dequantize_int4(self.packed, self.scales, rows, columns, self.dtype)

    def linear(
        self, x: Tensor, bias: Tensor | None, epilogue: str, residual: Tensor | None
    ) -> Tensor:
        return kernels.linear_int4(
            x, self.packed, self.scales, self.shape[0], bias, epilogue, residual
        )

    def gathered(self, places: Tensor) -> "Int4Tensor":
        inner = [rows_of_panels(x, places) for x in (self.packed, self.scales)]
        return self.with_inner(inner, len(places))
