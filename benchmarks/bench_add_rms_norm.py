"""Residual add and RMSNorm in one pass, forward and backward, at the model's shapes."""

from collections.abc import Iterator

import torch
from torch import Tensor

from internvl_engine import reference
from internvl_engine.kernels import add_rms_norm

from .bench_rms_norm import EPS, gradient_of, shapes
from .harness import Case, Provider, Run, compiled, ours


def fused(x: Tensor, residual: Tensor, scale: Tensor | None, weight: Tensor) -> tuple:
    return add_rms_norm(x, residual, scale, weight, EPS)


def eager(x: Tensor, residual: Tensor, scale: Tensor | None, weight: Tensor) -> tuple:
    return reference.add_rms_norm(x, residual, scale, weight, EPS)


def separate(x: Tensor, residual: Tensor, scale: Tensor | None, weight: Tensor) -> tuple:
    """What one writes without a fused operator: PyTorch's own norm after the sum."""
    residual_out = residual + (x if scale is None else x * scale)
    return torch.nn.functional.rms_norm(residual_out, weight.shape, weight, EPS), residual_out


def cases(device: str) -> Iterator[Case]:
    for label, shape in shapes(device).items():
        for dtype in (torch.float32, torch.bfloat16):
            x, residual = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
            scale, weight = (torch.randn(shape[-1], dtype=dtype, device=device) for _ in range(2))
            # QLLaMA has no layer scale.
            inputs = (x, residual, None if label.startswith("QLLaMA") else scale, weight)
            yield _forward(label, *inputs)
            yield _backward(label, *inputs)


def _forward(label: str, x: Tensor, residual: Tensor, scale: Tensor | None, weight: Tensor) -> Case:
    inputs = (x, residual, scale, weight)
    providers: dict[str, Provider | Run] = {
        **ours("add_rms_norm", lambda: fused(*inputs)),
        "eager": lambda: eager(*inputs),
        "F.rms_norm": lambda: separate(*inputs),
        **compiled(eager, *inputs),
    }
    traffic = (4 * x.numel() + 2 * weight.numel()) * x.element_size()
    return Case("add_rms_norm", f"{label}, forward", tuple(x.shape), x.dtype, providers, traffic)


def _backward(
    label: str, x: Tensor, residual: Tensor, scale: Tensor | None, weight: Tensor
) -> Case:
    leaves = (x, residual, weight) if scale is None else (x, residual, scale, weight)

    def of(function):
        if scale is None:
            return gradient_of(lambda x, r, w: function(x, r, None, w), *leaves)
        return gradient_of(function, *leaves)

    providers: dict[str, Provider | Run] = {
        **ours("add_rms_norm", of(fused)),
        "eager": of(eager),
        "F.rms_norm": of(separate),
    }
    passes = 6 if scale is not None else 4
    traffic = (passes * x.numel() + 4 * weight.numel()) * x.element_size()
    return Case("add_rms_norm", f"{label}, backward", tuple(x.shape), x.dtype, providers, traffic)
