"""The dtype a model is loaded in."""

import platform
from typing import Any, NamedTuple

import torch

from ..schemes import Scheme

_UNITS = {  # what it takes to multiply bfloat16
    "cpu": "AVX512-BF16, AMX, or bf16 on Arm",
    "cuda": "compute capability 8.0",
}
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class DtypeChoice(NamedTuple):
    """The dtype of a model's weights, and why it is that one."""

    dtype: torch.dtype
    reason: str

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)}: {self.reason}"


def choose_dtype(dtype: Any, device: torch.device) -> DtypeChoice:
    """The dtype that a model is loaded in, with the reason in words.

    Args:
        dtype: a torch dtype or its name. "auto", or None, is bfloat16 where the processor of the
            device computes in it, else float32.

    Raises:
        ValueError: it is no floating-point dtype.
    """
    if dtype is None or dtype == "auto":
        if computes_in_bfloat16(device):
            return DtypeChoice(torch.bfloat16, f"the {_kind(device)} multiplies it in hardware")
        units = _UNITS.get(device.type, "another kind of device")
        return DtypeChoice(
            torch.float32,
            f"the {_kind(device)} does not multiply bfloat16 in hardware, which takes {units}; "
            "dtype='bfloat16' takes half the memory",
        )
    found = dtype
    if isinstance(dtype, str):
        name = dtype.removeprefix("torch.")
        found = getattr(torch, _SHORT.get(name, name), None)
    if found not in FLOATS:
        raise ValueError(f"dtype must be auto, {', '.join(map(dtype_name, FLOATS))}, got {dtype!r}")
    return DtypeChoice(found, "asked for")


def resolve_dtype(dtype: Any, device: torch.device) -> torch.dtype:
    """As `choose_dtype`, without the reason."""
    return choose_dtype(dtype, device).dtype


def computes_quantized(dtype: torch.dtype) -> bool:
    """Whether weights in forms of ours compute in a dtype."""
    return dtype in FLOATS and dtype != torch.float64


def check_quantized(dtype: Any, scheme: Scheme | None) -> None:
    """Raises ValueError where weights of a scheme, None for wide ones, do not compute in a dtype.

    Args:
        dtype: a torch dtype, its name, "auto" or None.
        scheme: that weights are quantized by, or were.
    """
    if dtype in (None, "auto") or scheme is None:
        return
    if not computes_quantized(resolve_dtype(dtype, torch.device("cpu"))):
        raise ValueError(
            f"dtype={dtype!r}: weights that quantize={scheme.name!r} makes compute in float32, "
            "bfloat16 or float16"
        )


def dtype_name(dtype: Any) -> str:
    """A dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


def _kind(device: torch.device) -> str:
    return {"cpu": "processor", "cuda": "GPU"}.get(device.type, f"{device.type} device")


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware (AVX512-BF16, AMX, sm_80)."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    if platform.machine() in ("aarch64", "arm64"):
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()  # on x86 true without the instruction
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
