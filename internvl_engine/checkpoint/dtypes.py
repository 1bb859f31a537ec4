"""The dtype a model is loaded in."""

import platform
from typing import Any

import torch

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def resolve_dtype(dtype: Any, device: torch.device) -> torch.dtype:
    """A torch dtype from one, its name, or "auto".

    "auto" (or None) is bfloat16 where the processor of the device computes in it, else float32.

    Raises:
        ValueError: it is no floating-point dtype.
    """
    if dtype is None or dtype == "auto":
        return torch.bfloat16 if computes_in_bfloat16(device) else torch.float32
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found not in FLOATS:
        raise ValueError(f"dtype must be auto, {', '.join(map(dtype_name, FLOATS))}, got {dtype!r}")
    return found


def dtype_name(dtype: Any) -> str:
    """A dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware (AVX512-BF16, AMX, sm_80)."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    if platform.machine() in ("aarch64", "arm64"):
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()  # on x86 true without the instruction
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
