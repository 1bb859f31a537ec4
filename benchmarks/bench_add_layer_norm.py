"""Layer scale, residual add and LayerNorm in one pass, at the shapes of InternViT-300M and CLIP.

Eager is the sum, then F.layer_norm.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from internvl_engine import reference
from internvl_engine.kernels import add_layer_norm

from .bench_layer_norm import EPS, UNITS
from .cases import Case, backward, forward

SHAPES = {
    "InternViT-300M, 5 tiles": (5 * 1025, 1024),
    "CLIP ViT-L, 20 images": (20 * 257, 1024),  # no layer scale
    "InternViT-300M, 64 tiles": (64 * 1025, 1024),
}


def shapes(device: str) -> dict[str, tuple[int, int]]:
    """A batch of 64 tiles is for GPUs."""
    return {name: s for name, s in SHAPES.items() if device == "cuda" or s[0] < 10_000}


def cases(device: str) -> Iterator[Case]:
    for label, shape in shapes(device).items():
        for dtype in (torch.float32, torch.bfloat16):
            x, residual = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
            vectors = [torch.randn(shape[-1], dtype=dtype, device=device) for _ in range(3)]
            for direction in (forward, backward):
                some = vectors[1:] if label.startswith("CLIP") else vectors
                yield _case(label, direction, x, residual, *some)


def _case(label: str, direction: Callable, x: Tensor, residual: Tensor, *vectors: Tensor) -> Case:
    """Forward reads x and residual and writes y and their sum.

    Backward reads both gradients and the sum and writes dx, which is d residual too; with a layer
    scale also x, and d residual on its own. Of the vectors it does not read bias.
    """
    providers = direction(
        "add_layer_norm", with_eps(add_layer_norm), with_eps(reference.add_layer_norm), x,
        residual, *vectors, others={},
    )  # fmt: skip
    scaled, count = len(vectors) == 3, len(vectors)
    tensors, lines = (4, count) if direction is forward else (6 if scaled else 4, 2 * count - 1)
    traffic = (tensors * x.numel() + lines * x.shape[-1]) * x.element_size()
    label = f"{label}, {direction.__name__}"
    units = UNITS[direction]
    return Case(
        "add_layer_norm", label, tuple(x.shape), x.dtype, providers, traffic, tolerance=units
    )  # fmt: skip


def with_eps(function: Callable) -> Callable:
    """function(x, residual, scale, weight, bias, eps) of the tensors with or without the scale."""

    def run(x: Tensor, residual: Tensor, *vectors: Tensor) -> tuple[Tensor, Tensor]:
        scale = vectors[0] if len(vectors) == 3 else None
        return function(x, residual, scale, *vectors[-2:], EPS)

    return run
