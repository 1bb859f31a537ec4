"""QLLaMA's cross-attention of 96 queries to the vision tokens, forward and backward.

SDPA reads keys and values that were copied to every row of the batch before.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_engine import reference
from internvl_engine.kernels import cross_attention

from .bench_rms_norm import gradient_of
from .harness import Case, Provider, Run, compiled, ours

HEADS, DIM, QUERIES = 32, 128, 96
# label: (images, rows an image, vision tokens)
SHAPES = {
    "one image 224 px": (1, 1, 257),
    "one image 448 px": (1, 1, 1025),
    "three rows an image": (2, 3, 257),
}
GPU_SHAPES = {"64 images 224 px": (64, 1, 257), "training, 64 images x 3": (64, 3, 257)}


def cases(device: str) -> Iterator[Case]:
    for label, (images, repeat, tokens) in (
        SHAPES | (GPU_SHAPES if device == "cuda" else {})
    ).items():
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        q = torch.randn(images * repeat, QUERIES, HEADS, DIM, **options).transpose(1, 2)
        k, v = torch.randn(2, images, tokens, HEADS, DIM, **options).transpose(2, 3)
        yield _forward(label, q, k, v)
        yield _backward(label, q, k, v)


def _forward(label: str, q: Tensor, k: Tensor, v: Tensor) -> Case:
    repeat = q.shape[0] // k.shape[0]
    # Expanded outside the timing: a copy where several rows share an image.
    keys, values = (x.expand(repeat, *x.shape).flatten(0, 1) for x in (k, v))
    providers: dict[str, Provider | Run] = {
        **ours("cross_attention", lambda: cross_attention(q, k, v)),
        "eager": lambda: reference.cross_attention(q, k, v),
        "SDPA": lambda: F.scaled_dot_product_attention(q, keys, values),
        **compiled(reference.cross_attention, q, k, v),
    }
    return _case(f"{label}, forward", q, k, providers, 4, 2)


def _backward(label: str, q: Tensor, k: Tensor, v: Tensor) -> Case:
    def run(function: Callable) -> Run:
        return gradient_of(function, q, k, v)

    providers: dict[str, Provider | Run] = {
        **ours("cross_attention", run(cross_attention)),
        "eager": run(reference.cross_attention),
    }
    return _case(f"{label}, backward", q, k, providers, 10, 4)


def _case(
    label: str, q: Tensor, k: Tensor, providers: dict[str, Provider | Run], products: int,
    parts: int,
) -> Case:  # fmt: skip
    traffic = parts * (q.numel() + k.numel()) * q.element_size()
    flops = products * q.numel() * k.shape[2]
    return Case("cross_attention", label, tuple(q.shape), q.dtype, providers, traffic, flops)
