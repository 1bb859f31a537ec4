"""RMSNorm to rows of eight bits, beside the norm alone, at the model's shapes."""

from collections.abc import Iterator

import torch
from torch import Tensor

from internvl_engine import reference
from internvl_engine.kernels import rms_norm, rms_norm_quant

from . import bench_rms_norm
from .cases import Case, forward, rival

EPS = bench_rms_norm.EPS


def cases(device: str) -> Iterator[Case]:
    for label, shape in bench_rms_norm.shapes(device).items():
        x = torch.randn(shape, device=device).bfloat16()
        weight = torch.randn(shape[-1], device=device).bfloat16()
        for dtype in (torch.int8, torch.float8_e4m3fn):
            yield _case(f"{label}, {str(dtype)[6:]}", x, weight, dtype)


def _case(label: str, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Case:
    """Reads x and the weight, writes one byte a value and the scales."""

    def fused(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm_quant(x, weight, EPS, dtype)

    def eager(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return reference.rms_norm_quant(x, weight, EPS, dtype)

    providers = forward("rms_norm_quant", fused, eager, x, weight, others={})
    providers |= rival("rms_norm alone", lambda: rms_norm(x, weight, EPS), same=False)
    rows = x.numel() // x.shape[-1]
    traffic = 3 * x.numel() + 2 * weight.numel() + 4 * rows
    return Case("rms_norm_quant", label, tuple(x.shape), x.dtype, providers, traffic)
