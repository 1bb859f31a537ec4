"""The model's linear layers with weights of 8 bits, beside wide ones and other packages' 8 bits.

Speeds are related to our product with a wide weight, packed where there is such a layout. On the
CPU x is rounded to 8 bits row by row where the processor multiplies those; `_int_mm` is oneDNN's
product of matrices that are rounded already.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from internvl_engine import reference
from internvl_engine.kernels import (
    dequantize_int8,
    layout_of,
    linear,
    linear_int8,
    linear_packed,
    pack,
    quantize_int8,
)

from . import bench_linear, quantized_rivals
from .cases import Case, Provider, forward, rival

ROWS = {"vision": (1028,), "QLLaMA": (1, 8, 96)}
ROWS_GPU = {"vision": (257, 64 * 257), "QLLaMA": (1, 8, 96)}
WIDE, PRODUCT = "ours, wide", "_int_mm alone"


def cases(device: str) -> Iterator[Case]:
    for name, ((channels, features), epilogue, with_residual) in bench_linear.LAYERS.items():
        tower = name.split()[0]
        for rows in (ROWS_GPU if device == "cuda" else ROWS).get(tower, ()):
            for dtype in (torch.float32, torch.bfloat16):
                weight = (torch.randn(features, channels) * channels**-0.5).to(device, dtype)
                x = torch.randn(rows, channels, device=device).to(dtype)
                width = features // 2 if epilogue == "swiglu" else features
                residual = torch.randn(rows, width).to(x) if with_residual else None
                yield _case(f"{name}, {rows} rows", x, weight, epilogue, residual)


def _case(label: str, x: Tensor, weight: Tensor, epilogue: str, residual: Tensor | None) -> Case:
    """Reads x, the weight, its scales and the residual, and writes the result."""
    form = quantize_int8(weight)
    dense = dequantize_int8(*form[:2], x.shape[-1], x.dtype)

    def fused(x: Tensor) -> Tensor:
        return linear_int8(x, *form, None, epilogue, residual)

    def eager(x: Tensor) -> Tensor:
        return reference.linear(x, dense, None, epilogue, residual)

    providers = forward("linear_int8", fused, eager, x, others={})
    for name, mine in providers.items():
        if name.startswith("ours"):
            providers[name] = Provider(mine.run, mine.setting, error=quantized_rivals.INT8_ERROR)
    providers[WIDE] = Provider(_wide(x, dense, epilogue, residual))
    if x.device.type == "cpu":
        providers |= rival(PRODUCT, _product(x, dense), same=False)
        providers |= quantized_rivals.int8(_Layer(dense, epilogue, residual), x)
    outputs = x.shape[0] * weight.shape[0] // (2 if epilogue == "swiglu" else 1)
    outputs *= 1 if residual is None else 2
    traffic = x.element_size() * (x.numel() + outputs) + sum(tensor.nbytes for tensor in form)
    flops = 2 * x.shape[0] * weight.numel()
    return Case(
        "linear_int8", label, tuple(x.shape), x.dtype, providers, traffic, flops, baseline=WIDE
    )


class _Layer(nn.Module):
    """The layer as others take it."""

    def __init__(self, weight: Tensor, epilogue: str, residual: Tensor | None) -> None:
        super().__init__()
        with torch.device("meta"):
            self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.linear.weight = nn.Parameter(weight, requires_grad=False)
        self.epilogue, self.residual = reference.EPILOGUES[epilogue], residual

    def forward(self, x: Tensor) -> Tensor:
        """(M, C) to (M, F)."""
        y = self.epilogue(self.linear(x))
        return y if self.residual is None else self.residual + y


def _wide(x: Tensor, dense: Tensor, epilogue: str, residual: Tensor | None) -> partial:
    """The product with the values in x's dtype."""
    if layout_of(dense) is None:
        return partial(linear, x, dense, None, epilogue, residual)
    return partial(linear_packed, x, pack(dense), len(dense), None, epilogue, residual)


def _product(x: Tensor, dense: Tensor) -> partial:
    rounded = [(t / t.abs().max() * 127).round().to(torch.int8) for t in (x, dense)]
    return partial(torch._int_mm, rounded[0], rounded[1].t())
