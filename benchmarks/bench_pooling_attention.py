"""The pooler's attention with its projections absorbed into the query."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_engine import reference
from internvl_engine.kernels import pooling_attention

from .cases import Case, forward

EPS = 1e-5
HEADS = 16
# label: (images, tokens, channels)
SHAPES = {"vision 224 px x 4": (4, 257, 3200), "QLLaMA queries x 4": (4, 96, 4096)}
GPU_SHAPES = {"vision 224 px x 64": (64, 257, 3200)}


def cases(device: str) -> Iterator[Case]:
    """Reads the tokens and the query, writes as much as the query; two products of both."""
    for label, (images, tokens, cols) in (
        SHAPES | (GPU_SHAPES if device == "cuda" else {})
    ).items():
        x = torch.randn(images, tokens, cols, dtype=torch.bfloat16, device=device)
        query = torch.randn(images, HEADS, cols, dtype=torch.bfloat16, device=device) * cols**-0.5
        others = {"F.layer_norm, SDPA": separate}
        providers = forward("pooling_attention", fused, reference_of, query, x, others=others)
        traffic = (x.numel() + 2 * query.numel()) * x.element_size()
        flops = 4 * query.numel() * tokens
        yield Case("pooling_attention", label, tuple(x.shape), x.dtype, providers, traffic, flops)


def fused(query: Tensor, x: Tensor) -> Tensor:
    return pooling_attention(query, x, EPS)


def reference_of(query: Tensor, x: Tensor) -> Tensor:
    return reference.pooling_attention(query, x, EPS)


def separate(query: Tensor, x: Tensor) -> Tensor:
    """PyTorch's norm and attention: the query's heads as rows of one head."""
    normed = F.layer_norm(x, x.shape[-1:], eps=EPS)[:, None]
    return F.scaled_dot_product_attention(query[:, None], normed, normed, scale=1.0)[:, 0]
