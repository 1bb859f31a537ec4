"""QLLaMA's self-attention under its masks, forward and backward."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_engine import reference
from internvl_engine.kernels import attention

from .cases import Case, backward, compile_anew, forward

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
        heads = torch.randn(shape, dtype=torch.bfloat16, device=device).transpose(2, 3)
        key_padding_mask = None
        if padded:  # prompts of 14 tokens on average, padded on the right
            lengths = torch.randint(7, 22, (rows, 1), device=device)
            lengths = lengths + (positions - 80)
            key_padding_mask = torch.arange(positions, device=device) < lengths
        for direction in (forward, backward):
            yield _case(label, direction, heads, mask, key_padding_mask)


def _case(
    label: str, direction: Callable, heads: Tensor, mask: str, key_padding_mask: Tensor | None
) -> Case:
    """Forward reads q, k and v and writes out; backward reads those four and its gradient and
    writes three. Two and five products of the pairs that the mask lets through.
    """
    q, k, v = heads
    seen = reference.attention_mask(
        mask, q.shape[2], k.shape[2], QUERIES, key_padding_mask, q.device
    )

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, mask, QUERIES, key_padding_mask)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention(q, k, v, mask, QUERIES, key_padding_mask)

    others: dict[str, Callable] = {}
    if bool(seen.any(-1).all()):  # they give no mean for a row that sees nothing
        others["SDPA"] = sdpa(seen, q.shape[0])
        if direction is forward or q.is_cuda:  # none for the gradient on a CPU
            others["FlexAttention"] = flex(mask, key_padding_mask, q)
    providers = direction("attention", fused, eager, q, k, v, others=others)
    pairs = int(seen.expand(q.shape[0], -1, -1, -1).sum())
    parts, products = (4, 2) if direction is forward else (8, 5)
    label = f"{label}, {direction.__name__}"
    return Case(
        "attention", label, tuple(q.shape), q.dtype, providers,
        parts * q.numel() * q.element_size(), products * 2 * pairs * HEADS * DIM,
    )  # fmt: skip


def sdpa(seen: Tensor, rows: int) -> Callable:
    """PyTorch's attention under a mask that is a tensor."""
    bias = None if bool(seen.all()) else seen.expand(rows, -1, -1, -1)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def flex(mask: str, key_padding_mask: Tensor | None, q: Tensor) -> Callable:
    """FlexAttention, which leaves out blocks that nobody sees."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        causal, queries = j <= i, (i < QUERIES, j < QUERIES)
        if mask == "prefix":
            causal = causal | (queries[0] & queries[1])
        elif mask == "block":
            causal = (queries[0] == queries[1]) & (causal | queries[0])
        return causal if key_padding_mask is None else causal & key_padding_mask[b, j]

    block_mask = None
    if mask != "full" or key_padding_mask is not None:
        assert mask != "full", "the model pads no batch of image queries"
        rows = None if key_padding_mask is None else len(key_padding_mask)
        block_mask = create_block_mask(seen, rows, None, q.shape[2], q.shape[2], device=q.device)
    run = compile_anew(flex_attention)
    return lambda q, k, v: run(q, k, v, block_mask=block_mask)
