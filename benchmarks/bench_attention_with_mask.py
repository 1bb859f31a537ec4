"""Attention under transformers' masks: prefills of a chat model of 1B, 14 query heads on 2."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_engine import reference
from internvl_engine.kernels import attention_with_mask

from .cases import Case, forward

HEADS, KEY_HEADS, DIM = 14, 2, 64
TOKENS, PADDING = 1300, 300
# label: (queries, how far back each sees)
SHAPES = {"padded prefill": (1300, 1300), "window of 256": (1300, 256), "padded decode": (1, 1300)}


def cases(device: str) -> Iterator[Case]:
    """A batch of two, the second padded on the left; a window; a step behind the first."""
    for label, (queries, window) in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            yield _case(f"{label}, {str(dtype)[6:]}", queries, window, dtype, device)


def _case(label: str, queries: int, window: int, dtype: torch.dtype, device: str) -> Case:
    """Reads q, k, v and the mask and writes out; two products of the pairs that are seen."""
    q, k, v = (
        torch.randn(2, n, h, DIM, device=device).to(dtype).transpose(1, 2)
        for n, h in ((queries, HEADS), (TOKENS, KEY_HEADS), (TOKENS, KEY_HEADS))
    )
    rows = torch.arange(TOKENS - queries, TOKENS, device=device)[:, None]
    columns = torch.arange(TOKENS, device=device)
    real = columns >= torch.tensor([[0], [PADDING]], device=device)
    mask = (columns <= rows) & (columns > rows - window) & real[:, None, None]
    mask = mask | (columns == rows)  # padding sees itself: others give no mean

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (reference.repeat_heads(x, HEADS) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, mask)

    providers = forward(
        "attention_with_mask",
        lambda q, k, v: attention_with_mask(q, k, v, mask),
        lambda q, k, v: reference.attention_with_mask(q, k, v, mask),
        q, k, v, others={"SDPA": sdpa},
    )  # fmt: skip
    traffic = (2 * q.numel() + 2 * k.numel()) * q.element_size() + mask.numel()
    flops = 4 * HEADS * DIM * int(mask.sum())
    return Case("attention_with_mask", label, tuple(q.shape), dtype, providers, traffic, flops)
