"""Residual add and RMSNorm in one pass, forward and backward, at the model's shapes."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_engine import reference
from internvl_engine.kernels import add_rms_norm

from .bench_rms_norm import EPS, shapes
from .cases import Case, backward, forward, installed


def cases(device: str) -> Iterator[Case]:
    for label, shape in shapes(device).items():
        for dtype in (torch.float32, torch.bfloat16):
            x, residual = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
            scale, weight = (torch.randn(shape[-1], dtype=dtype, device=device) for _ in range(2))
            # QLLaMA has no layer scale.
            vectors = (weight,) if label.startswith("QLLaMA") else (scale, weight)
            for direction in (forward, backward):
                yield _case(label, direction, x, residual, *vectors)


def _case(label: str, direction: Callable, x: Tensor, residual: Tensor, *vectors: Tensor) -> Case:
    """Forward reads x and residual and writes y and their sum.

    Backward reads both gradients and the sum and writes dx, which is d residual too; with a layer
    scale also x, and d residual on its own.
    """
    scaled = len(vectors) == 2
    providers = direction(
        "add_rms_norm", with_eps(add_rms_norm), with_eps(reference.add_rms_norm), x, residual,
        *vectors, others=others(scaled),
    )  # fmt: skip
    tensors, times = (4, 1) if direction is forward else (6 if scaled else 4, 2)
    traffic = (tensors * x.numel() + times * len(vectors) * x.shape[-1]) * x.element_size()
    label = f"{label}, {direction.__name__}"
    return Case("add_rms_norm", label, tuple(x.shape), x.dtype, providers, traffic)


def with_eps(function: Callable) -> Callable:
    """function(x, residual, scale, weight, eps) of (x, residual, weight) or with the scale."""

    def run(x: Tensor, residual: Tensor, *vectors: Tensor) -> tuple[Tensor, Tensor]:
        scale = vectors[0] if len(vectors) == 2 else None
        return function(x, residual, scale, vectors[-1], EPS)

    return run


def separate(
    x: Tensor, residual: Tensor, scale: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """What one writes without a fused operator: PyTorch's own norm after the sum."""
    residual_out = residual + (x if scale is None else x * scale)
    return F.rms_norm(residual_out, weight.shape, weight, eps), residual_out


def others(scaled: bool) -> dict[str, Callable]:
    """PyTorch's, and Liger's, which has no layer scale."""
    found = {"F.rms_norm": with_eps(separate)}
    liger = installed("liger_kernel.transformers.functional", "liger_fused_add_rms_norm")
    if liger is not None and not scaled:
        found["Liger"] = lambda x, r, weight: tuple(liger(x, r, weight, EPS, in_place=False))
    return found
