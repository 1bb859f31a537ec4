"""The norm, projections, rotation and cache write of a decoding step, at QLLaMA's shapes."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from internvl_engine import reference
from internvl_engine.kernels import _decoding, decode_qkv

from .bench_norm_linear import EPS, in_forms, nbytes, squares_of, yardstick
from .cases import Case, Provider, compiled, ours

WIDTH, HEADS, DIM, SLOTS = 4096, 32, 128, 256
SHAPES = {"one caption": 1, "8 captions": 8}


def cases(device: str) -> Iterator[Case]:
    """Reads the weight, and little else."""
    for label, rows in SHAPES.items():
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        x, norm_weight = torch.randn(rows, 1, WIDTH, **options), torch.randn(WIDTH, **options)
        weight = torch.randn(3 * WIDTH, WIDTH, **options) / WIDTH**0.5
        table = reference.rotary_table(SLOTS, DIM, 10000.0, x.dtype, torch.device(device))
        positions = torch.full((rows, 1), 140, dtype=torch.int64, device=device)
        cache = torch.zeros(2, rows, HEADS, SLOTS, DIM, **options)
        rest: tuple[Any, ...] = (HEADS, *table, positions, positions, *cache)
        for form, parts, dense in in_forms(weight):
            norm: tuple[Any, ...] = (norm_weight, squares_of(x), EPS)
            eager = partial(composed, x, dense, norm_weight, *rest)
            providers = {
                **ours("decode_qkv", partial(decode_qkv, x, parts, None, *rest, *norm)),
                "eager": Provider(eager),
                **yardstick(x, dense),
                **compiled(composed, x, dense, norm_weight, *rest),
            }
            tolerance = 8.0 if form == "wide" or device == "cuda" else 64.0
            name, read = f"{label}, {form}", nbytes(parts)
            yield Case(
                "decode_qkv", name, tuple(x.shape), x.dtype, providers, read, tolerance=tolerance
            )


def composed(x, weight, norm_weight, heads, *rest):
    """The references, one after the other."""
    qkv = _decoding.norm_linear(x, weight, None, "none", norm_weight, None, EPS)
    q, k, v = qkv.unflatten(-1, (-1, DIM)).transpose(1, 2).chunk(3, dim=1)
    return reference.rotary_append(q, k, v, *rest)
