"""Rotary embedding of q and k, read as slices of a packed qkv, at QLLaMA's shapes."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from internvl_engine import reference
from internvl_engine.kernels import rotary

from .harness import Case, Provider, Run, compiled, ours

HEADS, DIM = 32, 128
SHAPES = {"decode": (1, 1), "queries and text": (1, 176), "batch of 32": (32, 176)}


def heads(batch: int, tokens: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """q, k, v (B, H, S, D) of one merged projection."""
    packed = torch.randn(batch, tokens, 3, HEADS, DIM, dtype=dtype, device=device)
    return tuple(x.transpose(1, 2) for x in packed.unbind(2))


def cases(device: str) -> Iterator[Case]:
    for label, (batch, tokens) in SHAPES.items():
        if batch > 1 and device == "cpu":
            continue
        for dtype in (torch.float32, torch.bfloat16):
            q, k, _ = heads(batch, tokens, dtype, device)
            table = reference.rotary_table(tokens, DIM, 10000.0, dtype, torch.device(device))
            args = (q, k, *table, torch.arange(tokens, device=device)[None])
            providers: dict[str, Provider | Run] = {
                **ours("rotary", partial(rotary, *args)),
                "eager": partial(reference.rotary, *args),
                **compiled(reference.rotary, *args),
            }
            traffic = 4 * q.numel() * q.element_size()
            yield Case("rotary", label, tuple(q.shape), dtype, providers, traffic)
