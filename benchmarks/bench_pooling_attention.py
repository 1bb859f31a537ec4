"""The pooler's attention with its projections absorbed into the query."""

from collections.abc import Iterator
from functools import partial

import torch

from internvl_engine import reference
from internvl_engine.kernels import pooling_attention

from .harness import Case, Provider, Run, compiled, ours

EPS = 1e-5
HEADS = 16
# label: (images, tokens, channels)
SHAPES = {"vision 224 px x 4": (4, 257, 3200), "QLLaMA queries x 4": (4, 96, 4096)}
GPU_SHAPES = {"vision 224 px x 64": (64, 257, 3200)}


def cases(device: str) -> Iterator[Case]:
    for label, (images, tokens, cols) in (
        SHAPES | (GPU_SHAPES if device == "cuda" else {})
    ).items():
        x = torch.randn(images, tokens, cols, dtype=torch.bfloat16, device=device)
        query = torch.randn(images, HEADS, cols, dtype=torch.bfloat16, device=device) * cols**-0.5
        args = (query, x, EPS)
        providers: dict[str, Provider | Run] = {
            **ours("pooling_attention", partial(pooling_attention, *args)),
            "eager": partial(reference.pooling_attention, *args),
            **compiled(reference.pooling_attention, *args),
        }
        traffic = (x.numel() + 2 * query.numel()) * x.element_size()
        yield Case("pooling_attention", label, tuple(x.shape), x.dtype, providers, traffic)
