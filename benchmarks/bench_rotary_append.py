"""Rotary embedding with the write to the KV cache, at QLLaMA's shapes."""

from collections.abc import Iterator

import torch

from internvl_engine import reference
from internvl_engine.kernels import rotary_append

from .bench_rotary import DIM, HEADS, SHAPES, heads
from .cases import Case, forward

ROWS = 256  # of the cache


def cases(device: str) -> Iterator[Case]:
    """Reads q, k and v, writes q and the cache's k and v, and reads cos and sin of every token."""
    for label, (batch, tokens) in SHAPES.items():
        if batch > 1 and device == "cpu":
            continue
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = heads(batch, tokens, dtype, device)
            table = reference.rotary_table(ROWS, DIM, 10000.0, dtype, torch.device(device))
            slots = torch.arange(tokens, device=device)
            cache = torch.zeros(2, batch, HEADS, ROWS, DIM, dtype=dtype, device=device)
            args = (q, k, v, *table, slots[None], slots, *cache)
            providers = forward(
                "rotary_append", rotary_append, reference.rotary_append, *args, others={}
            )
            traffic = (6 * q.numel() + tokens * DIM) * q.element_size()
            yield Case("rotary_append", label, tuple(q.shape), dtype, providers, traffic)
