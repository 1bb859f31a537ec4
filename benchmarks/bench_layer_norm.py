"""LayerNorm, forward and backward, at the shapes of InternViT-300M; eager is F.layer_norm."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from internvl_engine import reference
from internvl_engine.kernels import layer_norm

from .cases import Case, backward, forward

EPS = 1e-6
UNITS = {forward: 8.0, backward: 24.0}  # the tolerances of cases: see _case
SHAPES = {
    "tower, 5 tiles": (5 * 1025, 1024),
    "projector, 5 tiles": (5 * 256, 4096),
    "tower, 64 tiles": (64 * 1025, 1024),
}


def shapes(device: str) -> dict[str, tuple[int, int]]:
    """A batch of 64 tiles is for GPUs."""
    return {name: s for name, s in SHAPES.items() if device == "cuda" or s[0] < 10_000}


def cases(device: str) -> Iterator[Case]:
    for label, shape in shapes(device).items():
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape, dtype=dtype, device=device)
            weight, bias = (torch.randn(shape[-1], dtype=dtype, device=device) for _ in range(2))
            for direction in (forward, backward):
                yield _case(label, direction, x, weight, bias)


def _case(label: str, direction: Callable, x: Tensor, weight: Tensor, bias: Tensor) -> Case:
    """Forward reads x and writes y; backward reads grad and x and writes dx.

    On the CPU PyTorch sums the gradients of weight and bias in the dtype of x: over 5,125 rows it
    is 11 units off, whatever dtype that is.
    """
    providers = direction("layer_norm", fused, eager, x, weight, bias, others={})
    tensors, vectors = (2, 2) if direction is forward else (3, 3)
    traffic = (tensors * x.numel() + vectors * weight.numel()) * x.element_size()
    label = f"{label}, {direction.__name__}"
    units = UNITS[direction]
    return Case(
        "layer_norm", label, tuple(x.shape), x.dtype, providers, traffic, tolerance=units
    )  # fmt: skip


def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(x, weight, bias, EPS)


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference.layer_norm(x, weight, bias, EPS)
