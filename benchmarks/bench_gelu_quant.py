"""Activations to rows of eight bits, beside the activation alone, at the model's shapes."""

from collections.abc import Iterator

import torch
from torch import Tensor

from internvl_engine import reference
from internvl_engine.kernels import apply_epilogue, gelu_quant

from .cases import Case, forward, rival

SHAPES = {
    "vision": ((257, 12800), "gelu"),
    "QLLaMA": ((96, 22016), "swiglu"),
    "vision x 64": ((64 * 257, 12800), "gelu"),
}


def cases(device: str) -> Iterator[Case]:
    for label, (shape, epilogue) in SHAPES.items():
        if device != "cuda" and shape[0] > 10_000:
            continue
        x = torch.randn(shape, device=device).bfloat16()
        for dtype in (torch.int8, torch.float8_e4m3fn):
            yield _case(f"{label}, {str(dtype)[6:]}", x, dtype, epilogue)


def _case(label: str, x: Tensor, dtype: torch.dtype, epilogue: str) -> Case:
    """Reads x, writes one byte a value and the scales."""

    def fused(x: Tensor) -> tuple[Tensor, Tensor]:
        return gelu_quant(x, dtype, epilogue)

    def eager(x: Tensor) -> tuple[Tensor, Tensor]:
        return reference.gelu_quant(x, dtype, epilogue)

    providers = forward("gelu_quant", fused, eager, x, others={})
    providers |= rival("the activation alone", lambda: apply_epilogue(x, epilogue), same=False)
    written = x.numel() // 2 if epilogue == "swiglu" else x.numel()
    traffic = 2 * x.numel() + written + 4 * x.shape[0]
    return Case("gelu_quant", label, tuple(x.shape), x.dtype, providers, traffic)
