"""QLLaMA's self-attention under its masks, forward and backward."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_engine import reference
from internvl_engine.kernels import attention

from .bench_rms_norm import gradient_of
from .harness import Case, Provider, Run, compiled, ours

HEADS, DIM, QUERIES = 32, 128, 96
# label: (rows, positions, mask, whether the batch is padded)
SHAPES = {
    "image queries": (1, QUERIES, "full", False),
    "caption prefill": (1, QUERIES + 32, "prefix", False),
    "text x 16": (16, 80, "causal", True),
}
GPU_SHAPES = {
    "image queries x 64": (64, QUERIES, "full", False),
    "contrastive training x 64": (64, QUERIES + 80, "block", True),
}


def cases(device: str) -> Iterator[Case]:
    shapes = SHAPES | (GPU_SHAPES if device == "cuda" else {})
    for label, (rows, positions, mask, padded) in shapes.items():
        shape = (3, rows, positions, HEADS, DIM)
        q, k, v = torch.randn(shape, dtype=torch.bfloat16, device=device).transpose(2, 3)
        visible = None
        if padded:  # prompts of 14 tokens on average, padded on the right
            lengths = torch.randint(7, 22, (rows, 1), device=device)
            lengths = lengths + (positions - 80)
            visible = torch.arange(positions, device=device) < lengths
        yield _forward(label, q, k, v, mask, visible)
        yield _backward(label, q, k, v, mask, visible)


def _forward(label: str, q: Tensor, k: Tensor, v: Tensor, mask: str, visible) -> Case:
    def eager(q, k, v):
        return reference.attention(q, k, v, mask, QUERIES, visible)

    seen = reference.attention_mask(mask, q.shape[2], k.shape[2], QUERIES, visible, q.device)
    providers: dict[str, Provider | Run] = {
        **ours("attention", lambda: attention(q, k, v, mask, QUERIES, visible)),
        "eager": lambda: eager(q, k, v),
        **compiled(eager, q, k, v),
    }
    if bool(seen.any(-1).all()):  # PyTorch's gives no mean for a row that sees nothing
        bias = None if bool(seen.all()) else seen.expand(q.shape[0], -1, -1, -1)
        providers["SDPA"] = lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return _case(f"{label}, forward", q, providers, 4, 4, seen)


def _backward(label: str, q: Tensor, k: Tensor, v: Tensor, mask: str, visible) -> Case:
    def run(function: Callable) -> Run:
        return gradient_of(lambda q, k, v: function(q, k, v, mask, QUERIES, visible), q, k, v)

    seen = reference.attention_mask(mask, q.shape[2], k.shape[2], QUERIES, visible, q.device)
    providers: dict[str, Provider | Run] = {
        **ours("attention", run(attention)),
        "eager": run(reference.attention),
    }
    return _case(f"{label}, backward", q, providers, 10, 8, seen)


def _case(
    label: str, q: Tensor, providers: dict[str, Provider | Run], products: int, parts: int,
    seen: Tensor,
) -> Case:  # fmt: skip
    """Counts the operations of the pairs that the mask lets through."""
    pairs = int(seen.expand(q.shape[0], -1, -1, -1).sum())
    traffic = parts * q.numel() * q.element_size()
    flops = products * pairs * HEADS * DIM
    return Case("attention", label, tuple(q.shape), q.dtype, providers, traffic, flops)
