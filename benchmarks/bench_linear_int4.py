"""The linear layers of QLLaMA with weights of 4 bits, beside wide ones and PyTorch's own 4 bits.

Speeds are related to our product with a wide weight, packed where there is such a layout. The bytes
are those of the 4 bits: a share of the copy's peak is that of the weights' reading.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from internvl_engine import reference
from internvl_engine.kernels import (
    dequantize_int4,
    layout_of,
    linear,
    linear_int4,
    linear_packed,
    pack,
    quantize_int4,
)

from . import bench_linear
from .cases import Case, Provider, forward, rival
from .quantized_rivals import GROUP, INT4_ERROR, Int4Linear

ROWS, ROWS_GPU = (1, 4, 16, 96), (1, 8, 96)
WIDE = "ours, wide"


def cases(device: str) -> Iterator[Case]:
    for name, ((channels, features), epilogue, with_residual) in bench_linear.LAYERS.items():
        if not name.startswith("QLLaMA"):
            continue
        weight = (torch.randn(features, channels) * channels**-0.5).to(device, torch.bfloat16)
        for rows in ROWS_GPU if device == "cuda" else ROWS:
            x = torch.randn(rows, channels, device=device).bfloat16()
            width = features // 2 if epilogue == "swiglu" else features
            residual = torch.randn(rows, width, device=device).bfloat16() if with_residual else None
            yield _case(f"{name}, {rows} rows", x, weight, epilogue, residual)


def _case(label: str, x: Tensor, weight: Tensor, epilogue: str, residual: Tensor | None) -> Case:
    """Reads x, the weight, its scales and the residual, and writes the result."""
    packed, scales = quantize_int4(weight)
    features, channels = weight.shape
    dense = dequantize_int4(packed, scales, features, channels, x.dtype)

    def fused(x: Tensor) -> Tensor:
        return linear_int4(x, packed, scales, features, None, epilogue, residual)

    def eager(x: Tensor) -> Tensor:
        return reference.linear(x, dense, None, epilogue, residual)

    providers = forward("linear_int4", fused, eager, x, others={})
    providers[WIDE] = Provider(_wide(x, dense, epilogue, residual))
    if channels % GROUP == 0 and x.device.type == "cpu":
        providers |= _pytorch(x, dense, epilogue, residual)
    width = features // 2 if epilogue == "swiglu" else features
    outputs = x.shape[0] * width * (1 if residual is None else 2)
    traffic = x.element_size() * (x.numel() + outputs) + packed.nbytes + scales.nbytes
    flops = 2 * x.shape[0] * weight.numel()
    return Case(
        "linear_int4", label, tuple(x.shape), x.dtype, providers, traffic, flops, baseline=WIDE
    )


def _wide(x: Tensor, dense: Tensor, epilogue: str, residual: Tensor | None) -> partial:
    """The product with the values in 16 bits."""
    if layout_of(dense) is None:
        return partial(linear, x, dense, None, epilogue, residual)
    return partial(linear_packed, x, pack(dense), len(dense), None, epilogue, residual)


def _pytorch(
    x: Tensor, dense: Tensor, epilogue: str, residual: Tensor | None
) -> dict[str, Provider]:
    """PyTorch's product with weights of 4 bits, which rounds them itself."""
    with torch.device("meta"):
        layer = nn.Linear(dense.shape[1], dense.shape[0], bias=False, dtype=dense.dtype)
    layer.weight = nn.Parameter(dense, requires_grad=False)
    found = rival("PyTorch int4", partial(_finished, Int4Linear(layer), x, epilogue, residual))
    return {name: Provider(each.run, error=INT4_ERROR) for name, each in found.items()}


def _finished(product: nn.Module, x: Tensor, epilogue: str, residual: Tensor | None) -> Tensor:
    y = reference.EPILOGUES[epilogue](product(x))
    return y if residual is None else residual + y
