"""SwiGLU, forward and backward, at the width of QLLaMA's MLP."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from internvl_engine import reference
from internvl_engine.kernels import swiglu

from .cases import Case, backward, forward, installed

SHAPES = {"decode": (1, 22016), "queries and text": (176, 22016), "batch of 32": (32 * 176, 22016)}


def cases(device: str) -> Iterator[Case]:
    for label, shape in SHAPES.items():
        if device == "cpu" and shape[0] > 1000:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            gate_up = torch.randn(shape, dtype=dtype, device=device)
            for direction in (forward, backward):
                yield _case(label, direction, gate_up)


def _case(label: str, direction: Callable, gate_up: Tensor) -> Case:
    """In halves of gate_up: forward reads 2 and writes 1; backward reads 3 and writes 2."""
    rivals = others(gate_up, direction is forward)
    providers = direction("swiglu", swiglu, reference.swiglu, gate_up, others=rivals)
    halves = 3 if direction is forward else 5
    traffic = halves * gate_up.numel() // 2 * gate_up.element_size()
    label = f"{label}, {direction.__name__}"
    return Case("swiglu", label, tuple(gate_up.shape), gate_up.dtype, providers, traffic)


def others(gate_up: Tensor, is_forward: bool) -> dict[str, Callable]:
    """Liger's: of a merged tensor, and of halves that lie apart already.

    The gradient of the latter overwrites what it was computed from and cannot be replayed.
    """
    found: dict[str, Callable] = {}
    merged = installed("liger_kernel.ops.swiglu", "LigerFusedGateUpSiLUMulFunction")
    if merged is not None:
        found["Liger, merged"] = merged.apply
    apart = installed("liger_kernel.transformers.functional", "liger_swiglu")
    if apart is not None and is_forward:
        gate, up = (half.contiguous() for half in gate_up.chunk(2, dim=-1))
        found["Liger, apart"] = lambda _: apart(gate, up)
    return found
