"""A weight of eight-bit floating point with a scale a row: see kernels/linear_fp8.py."""

import torch
from torch import Tensor

from .. import kernels
from .quantized import Layout, QuantizedTensor


class Fp8Tensor(QuantizedTensor):
    """A weight (F, C): packed float8_e4m3fn (F, C), scales float32 (F,)."""

    FORM = "fp8"
    INNER = ("packed", "scales")

    scales: Tensor

    @classmethod
    def inner_layouts(cls, shape: tuple[int, ...]) -> list[Layout]:
        return [
            {
                "packed": (tuple(shape), torch.float8_e4m3fn),
                "scales": ((shape[0],), torch.float32),
            }
        ]

    @classmethod
    def _quantize(cls, weight: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return kernels.quantize_fp8(weight)

    def dense(self) -> Tensor:
        return kernels.dequantize_fp8(self.packed, self.scales, self.dtype)

    def linear(
        self, x: Tensor, bias: Tensor | None, epilogue: str, residual: Tensor | None
    ) -> Tensor:
        return kernels.linear_fp8(x, self.packed, self.scales, bias, epilogue, residual)

    def gathered(self, places: Tensor) -> "Fp8Tensor":
        bits = self.packed.view(torch.uint8)[places]  # PyTorch does not gather float8
        return self.with_inner([bits.view(torch.float8_e4m3fn), self.scales[places]], len(places))
