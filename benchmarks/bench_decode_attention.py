"""One decoding step of QLLaMA against its KV cache."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from internvl_engine import reference
from internvl_engine.kernels import decode_attention

from .harness import Case, Provider, Run, compiled, ours

HEADS, DIM, SLOTS = 32, 128, 256
# label: (rows, keys that are valid in 256 slots)
SHAPES = {"one caption": (1, 140), "five beams": (5, 140)}
GPU_SHAPES = {"64 captions": (64, 140)}


def cases(device: str) -> Iterator[Case]:
    for label, (rows, length) in (SHAPES | (GPU_SHAPES if device == "cuda" else {})).items():
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        q = torch.randn(rows, 1, HEADS, DIM, **options).transpose(1, 2)
        k, v = torch.randn(2, rows, HEADS, SLOTS, DIM, **options)
        lengths = torch.full((rows,), length, device=device)
        valid = [x[:, :, :length] for x in (k, v)]  # what SDPA gets without looking at lengths
        args = (q, k, v, lengths)
        providers: dict[str, Provider | Run] = {
            **ours("decode_attention", partial(decode_attention, *args)),
            "eager": partial(reference.decode_attention, *args),
            "SDPA, valid keys": partial(F.scaled_dot_product_attention, q, *valid),
            **compiled(reference.decode_attention, *args),
        }
        traffic = 2 * rows * HEADS * length * DIM * q.element_size()
        yield Case("decode_attention", label, tuple(k.shape), q.dtype, providers, traffic)
