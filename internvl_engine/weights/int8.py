"""A weight of 8 bits with a scale a row: kernels/linear_int8.py has its layout and its product."""

import torch
from torch import Tensor

from .. import kernels
from .quantized import PANEL_ROWS, Layout, QuantizedTensor, rows_of_panels


class Int8Tensor(QuantizedTensor):
    """A weight (F, C): packed int8 (P, S, 32, 4), scales float32 (F,), sums int32 (F,)."""

    FORM = "int8"
    INNER = ("packed", "scales", "sums")
    ROWS = PANEL_ROWS

    scales: Tensor
    sums: Tensor

    @classmethod
    def inner_layouts(cls, shape: tuple[int, ...]) -> list[Layout]:
        rows, columns = shape
        panels = -(-rows // PANEL_ROWS), -(-columns // 4), PANEL_ROWS, 4
        return [
            {
                "packed": (panels, torch.int8),
                "scales": ((rows,), torch.float32),
                "sums": ((rows,), torch.int32),
            }
        ]

    @classmethod
    def _quantize(cls, weight: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return kernels.quantize_int8(weight)

    def dense(self) -> Tensor:
        return kernels.dequantize_int8(self.packed, self.scales, self.shape[1], self.dtype)

    def linear(
        self, x: Tensor, bias: Tensor | None, epilogue: str, residual: Tensor | None
    ) -> Tensor:
        return kernels.linear_int8(x, self.packed, self.scales, self.sums, bias, epilogue, residual)

    def gathered(self, places: Tensor) -> "Int8Tensor":
        inner = [rows_of_panels(self.packed, places), self.scales[places], self.sums[places]]
        return self.with_inner(inner, len(places))
