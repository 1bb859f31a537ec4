"""Rotary embedding with the write to the KV cache, at QLLaMA's shapes."""

from collections.abc import Iterator
from functools import partial

import torch

from internvl_engine import reference
from internvl_engine.kernels import rotary_append

from .bench_rotary import DIM, HEADS, SHAPES, heads
from .harness import Case, Provider, Run, ours

ROWS = 256  # of the cache


def cases(device: str) -> Iterator[Case]:
    for label, (batch, tokens) in SHAPES.items():
        if batch > 1 and device == "cpu":
            continue
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = heads(batch, tokens, dtype, device)
            table = reference.rotary_table(ROWS, DIM, 10000.0, dtype, torch.device(device))
            slots = torch.arange(tokens, device=device)
            cache = torch.zeros(2, batch, HEADS, ROWS, DIM, dtype=dtype, device=device)
            args = (q, k, v, *table, slots[None], slots, *cache)
            providers: dict[str, Provider | Run] = {
                **ours("rotary_append", partial(rotary_append, *args)),
                "eager": partial(reference.rotary_append, *args),
            }
            traffic = 6 * q.numel() * q.element_size()
            yield Case("rotary_append", label, tuple(q.shape), dtype, providers, traffic)
