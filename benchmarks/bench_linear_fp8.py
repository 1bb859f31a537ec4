"""The linear layers of the model with weights in float8, beside the same in 16 bits."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_engine import reference
from internvl_engine.kernels import linear_fp8, quantize_fp8

from . import bench_linear
from .cases import Case, forward, rival


def cases(device: str) -> Iterator[Case]:
    """Fewer than on 16 bits: the CPU widens the weight in every call."""
    all_rows = bench_linear.ROWS_GPU if device == "cuda" else bench_linear.ROWS
    for name, ((channels, features), epilogue, with_residual) in bench_linear.LAYERS.items():
        weight = (torch.randn(features, channels) * channels**-0.5).to(device, torch.bfloat16)
        for rows in all_rows[name.split()[0]][:1]:
            x = torch.randn(rows, channels, device=device).bfloat16()
            width = features // 2 if epilogue == "swiglu" else features
            residual = torch.randn(rows, width, device=device).bfloat16() if with_residual else None
            yield _case(f"{name}, {rows} rows", x, weight, epilogue, residual)


def _case(label: str, x: Tensor, weight: Tensor, epilogue: str, residual: Tensor | None) -> Case:
    """Reads x, the weight, its scales and the residual, and writes the result."""
    packed, scales = quantize_fp8(weight)

    def fused(x: Tensor) -> Tensor:
        return linear_fp8(x, packed, scales, None, epilogue, residual)

    def eager(x: Tensor) -> Tensor:
        return reference.linear_fp8(x, packed, scales, None, epilogue, residual)

    providers = forward("linear_fp8", fused, eager, x, others={})
    providers |= rival("F.linear in 16 bits", lambda: F.linear(x, weight), same=False)
    features, channels = packed.shape
    width = features // 2 if epilogue == "swiglu" else features
    outputs = x.shape[0] * width * (1 if residual is None else 2)
    traffic = 2 * (x.numel() + outputs) + packed.numel() + 4 * features
    flops = 2 * x.shape[0] * packed.numel()
    return Case(
        "linear_fp8", label, tuple(x.shape), x.dtype, providers, traffic, flops,
        tolerance=16.0,  # a GPU rounds x to three bits
    )  # fmt: skip
