"""SwiGLU, forward and backward, at the width of QLLaMA's MLP."""

from collections.abc import Iterator

import torch
from torch import Tensor

from internvl_engine import reference
from internvl_engine.kernels import swiglu

from .bench_rms_norm import gradient_of
from .harness import Case, Provider, Run, compiled, ours

SHAPES = {"decode": (1, 22016), "queries and text": (176, 22016), "batch of 32": (32 * 176, 22016)}


def cases(device: str) -> Iterator[Case]:
    for label, shape in SHAPES.items():
        if device == "cpu" and shape[0] > 1000:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            gate_up = torch.randn(shape, dtype=dtype, device=device)
            yield _forward(label, gate_up)
            yield _backward(label, gate_up)


def _forward(label: str, gate_up: Tensor) -> Case:
    providers: dict[str, Provider | Run] = {
        **ours("swiglu", lambda: swiglu(gate_up)),
        "eager": lambda: reference.swiglu(gate_up),
        **compiled(reference.swiglu, gate_up),
        **liger(gate_up),
    }
    traffic = gate_up.numel() * gate_up.element_size() * 3 // 2
    shape = tuple(gate_up.shape)
    return Case("swiglu", f"{label}, forward", shape, gate_up.dtype, providers, traffic)


def _backward(label: str, gate_up: Tensor) -> Case:
    providers: dict[str, Provider | Run] = {
        **ours("swiglu", gradient_of(swiglu, gate_up)),
        "eager": gradient_of(reference.swiglu, gate_up),
    }
    traffic = gate_up.numel() * gate_up.element_size() * 5 // 2
    shape = tuple(gate_up.shape)
    return Case("swiglu", f"{label}, backward", shape, gate_up.dtype, providers, traffic)


def liger(gate_up: Tensor) -> dict[str, Provider | Run]:
    """Liger's, which takes gate and up apart, where it is installed and there is a GPU."""
    if gate_up.device.type != "cuda":
        return {}
    try:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError:
        return {}
    gate, up = (half.contiguous() for half in gate_up.chunk(2, dim=-1))
    return {"Liger": lambda: LigerSiLUMulFunction.apply(gate, up)}
