"""One decoding step of QLLaMA against its KV cache."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_engine import reference
from internvl_engine.kernels import decode_attention

from .cases import Case, forward, installed

HEADS, DIM, SLOTS = 32, 128, 256
# label: (rows, keys that are valid in 256 slots)
SHAPES = {"one caption": (1, 140), "five beams": (5, 140)}
GPU_SHAPES = {"64 captions": (64, 140)}


def cases(device: str) -> Iterator[Case]:
    """Reads the valid keys and values and one query a row, and writes its output."""
    for label, (rows, length) in (SHAPES | (GPU_SHAPES if device == "cuda" else {})).items():
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        q = torch.randn(rows, 1, HEADS, DIM, **options).transpose(1, 2)
        k, v = torch.randn(2, rows, HEADS, SLOTS, DIM, **options)
        args = (q, k, v, torch.full((rows,), length, device=device))
        providers = forward(
            "decode_attention", decode_attention, reference.decode_attention, *args,
            others=others(length),
        )  # fmt: skip
        traffic = 2 * (rows * HEADS * length * DIM + q.numel()) * q.element_size()
        flops = 4 * q.numel() * length
        yield Case("decode_attention", label, tuple(k.shape), q.dtype, providers, traffic, flops)


def others(length: int) -> dict[str, Callable]:
    """SDPA on the valid keys, which it gets without looking at lengths, and flash-attn."""

    def sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k[:, :, :length], v[:, :, :length])

    found: dict[str, Callable] = {"SDPA, valid keys": sdpa}
    attend = installed("flash_attn", "flash_attn_with_kvcache")

    def flash_attn(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, S, H, D)
        return attend(q, k, v, cache_seqlens=lengths.int()).transpose(1, 2)

    return found if attend is None else found | {"flash-attn": flash_attn}
