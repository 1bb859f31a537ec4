"""Rotary embedding of q and k, read as slices of a packed qkv, at QLLaMA's shapes."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from internvl_engine import reference
from internvl_engine.kernels import rotary

from .cases import Case, forward, installed

HEADS, DIM = 32, 128
SHAPES = {"decode": (1, 1), "queries and text": (1, 176), "batch of 32": (32, 176)}


def heads(batch: int, tokens: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """q, k, v (B, H, S, D) of one merged projection."""
    packed = torch.randn(batch, tokens, 3, HEADS, DIM, dtype=dtype, device=device)
    return tuple(x.transpose(1, 2) for x in packed.unbind(2))


def cases(device: str) -> Iterator[Case]:
    """Reads and writes q and k, and reads a row of cos and sin for every token."""
    for label, (batch, tokens) in SHAPES.items():
        if batch > 1 and device == "cpu":
            continue
        for dtype in (torch.float32, torch.bfloat16):
            q, k, _ = heads(batch, tokens, dtype, device)
            table = reference.rotary_table(tokens, DIM, 10000.0, dtype, torch.device(device))
            args = (q, k, *table, torch.arange(tokens, device=device)[None])
            providers = forward("rotary", rotary, reference.rotary, *args, others=others(*args[2:]))
            traffic = (4 * q.numel() + tokens * DIM) * q.element_size()
            yield Case("rotary", label, tuple(q.shape), dtype, providers, traffic)


def others(cos: Tensor, sin: Tensor, positions: Tensor) -> dict[str, Callable]:
    """Liger's. It rotates in place what is contiguous, which slices of several tokens are not; one
    token has position 0 here, whose rotation changes nothing.
    """
    liger = installed("liger_kernel.transformers.functional", "liger_rope")
    if liger is None:
        return {}
    wide = [torch.cat((x, x), -1)[positions] for x in (cos, sin)]  # (1, S, D)
    return {"Liger": lambda q, k, *_: liger(q, k, *wide)}
