"""The linear layers of the model: the product, its epilogue, and on the CPU packed weights."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_engine import reference
from internvl_engine.kernels import layout_of, linear, linear_packed, pack

from .cases import Case, Provider, forward, rival

# (C, F), epilogue, residual
LAYERS: dict[str, tuple[tuple[int, int], str, bool]] = {
    "vision qkv": ((3200, 9600), "none", False),
    "vision proj": ((3200, 3200), "none", False),
    "vision fc1": ((3200, 12800), "gelu", False),
    "vision fc2": ((12800, 3200), "none", True),
    "QLLaMA qkv": ((4096, 12288), "none", False),
    "QLLaMA gate_up": ((4096, 22016), "swiglu", False),
    "QLLaMA down": ((11008, 4096), "none", True),
    "cross k": ((3200, 4096), "none", False),
}
ROWS = {"vision": (257, 1028), "QLLaMA": (1, 12, 96), "cross": (257,)}
ROWS_GPU = {"vision": (257, 64 * 257), "QLLaMA": (1, 96, 64 * 96), "cross": (257, 64 * 257)}


def cases(device: str) -> Iterator[Case]:
    for name, ((channels, features), epilogue, with_residual) in LAYERS.items():
        weight = (torch.randn(features, channels) * channels**-0.5).to(device, torch.bfloat16)
        packed = pack(weight) if layout_of(weight) else None
        for rows in (ROWS_GPU if device == "cuda" else ROWS)[name.split()[0]]:
            x = torch.randn(rows, channels, device=device).bfloat16()
            bias = torch.randn(features, device=device).bfloat16() if "fc" in name else None
            width = features // 2 if epilogue == "swiglu" else features
            residual = torch.randn(rows, width, device=device).bfloat16() if with_residual else None
            arguments = (bias, epilogue, residual)
            yield _case(f"{name}, {rows} rows", x, weight, packed, arguments)


def _case(
    label: str, x: Tensor, weight: Tensor, packed: Tensor | None,
    arguments: tuple[Tensor | None, str, Tensor | None],
) -> Case:  # fmt: skip
    """Reads x, the weight, the bias and the residual, and writes the result."""
    bias, epilogue, residual = arguments

    def fused(x: Tensor, weight: Tensor) -> Tensor:
        return linear(x, weight, *arguments)

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        return reference.linear(x, weight, *arguments)

    providers = forward("linear", fused, eager, x, weight, others={})
    if packed is not None:
        features = weight.shape[0]
        providers["ours (packed)"] = Provider(
            lambda: linear_packed(x, packed, features, *arguments)
        )
    is_plain = bias is None and residual is None and epilogue == "none"
    providers |= rival("F.linear alone", lambda: F.linear(x, weight), same=is_plain)
    width = weight.shape[0] // 2 if epilogue == "swiglu" else weight.shape[0]
    outputs = x.shape[0] * width * (1 if residual is None else 2)
    elements = x.numel() + weight.numel() + outputs + (0 if bias is None else bias.numel())
    flops = 2 * x.shape[0] * weight.numel()
    traffic = elements * x.element_size()
    return Case("linear", label, tuple(x.shape), x.dtype, providers, traffic, flops)
