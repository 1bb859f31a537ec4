"""SwiGLU in Triton. What it computes: kernels/swiglu.py. Bound by memory.

Divisions are IEEE's: with the GPU's fast ones float32 would have 1.3 times the error of eager.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._rows import as_rows
from ._cross_compile import Case
from ._rows import empty_rows, row_offsets
from ._sizes import cdiv
from ._tuning import ARCHITECTURES, Config, launch_config, size_class

# 8 values a thread: 16-byte loads of bf16. Not yet measured on a GPU.
DEFAULTS: dict[str, Config] = {name: {"BLOCK": 1024, "num_warps": 4} for name in ARCHITECTURES}
CANDIDATES: list[Config] = [
    {"BLOCK": values * 32 * warps, "num_warps": warps} for warps in (2, 4, 8) for values in (8, 16)
]


@triton.jit(do_not_specialize=["inner"])
def _swiglu_kernel(gate_up_ptr, y_ptr, inner, outer_stride, inner_stride, F, BLOCK: tl.constexpr):
    """Program (row, block) computes BLOCK values of one row of y (rows, F), contiguous."""
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < F
    start = gate_up_ptr + row_offsets(row, inner, outer_stride, inner_stride)
    gate = tl.load(start + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(start + F + cols, mask=mask, other=0.0).to(tl.float32)
    y = (tl.div_rn(gate, 1 + tl.exp(-gate)) * up).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row.to(tl.int64) * F + cols, y, mask=mask)


@triton.jit(do_not_specialize=["grad_inner", "inner"])
def _swiglu_backward_kernel(
    grad_ptr, gate_up_ptr, d_ptr, grad_inner, grad_outer_stride, grad_inner_stride,
    inner, outer_stride, inner_stride, F, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, block) computes BLOCK values each of dgate and dup in d (rows, 2F)."""
    row = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < F
    start = gate_up_ptr + row_offsets(row, inner, outer_stride, inner_stride)
    gate = tl.load(start + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(start + F + cols, mask=mask, other=0.0).to(tl.float32)
    start = grad_ptr + row_offsets(row, grad_inner, grad_outer_stride, grad_inner_stride)
    grad = tl.load(start + cols, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.div_rn(1.0, 1 + tl.exp(-gate))
    dgate = grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    start = d_ptr + row.to(tl.int64) * 2 * F
    tl.store(start + cols, dgate.to(d_ptr.dtype.element_ty), mask=mask)
    tl.store(start + F + cols, (grad * gate * sigmoid).to(d_ptr.dtype.element_ty), mask=mask)


def swiglu_triton(gate_up: Tensor, config: Config | None = None) -> Tensor:
    """Launches the forward kernel; takes CPU tensors too under TRITON_INTERPRET=1."""
    if gate_up.dtype == torch.float64:
        return NotImplemented
    F = gate_up.shape[-1] // 2
    y = gate_up.new_empty((*gate_up.shape[:-1], F))
    if y.numel() == 0:
        return y
    config = config or launch_config(
        "swiglu", (F, gate_up.dtype, size_class(y.numel() // F)), DEFAULTS, CANDIDATES,
        lambda config: swiglu_triton(gate_up, config), gate_up.get_device(),
    )  # fmt: skip
    rows = as_rows(gate_up)
    grid = (y.numel() // F, cdiv(F, config["BLOCK"]))
    _swiglu_kernel[grid](rows.x, y, *rows[1:], F, **config)
    return y


def swiglu_backward_triton(grad: Tensor, gate_up: Tensor, config: Config | None = None) -> Tensor:
    """Launches the backward kernel."""
    if gate_up.dtype == torch.float64:
        return NotImplemented
    F = gate_up.shape[-1] // 2
    d = empty_rows(gate_up, gate_up.dtype)
    if d.numel() == 0:
        return d
    config = config or launch_config(
        "swiglu_backward", (F, gate_up.dtype, size_class(grad.numel() // F)), DEFAULTS, CANDIDATES,
        lambda config: swiglu_backward_triton(grad, gate_up, config), gate_up.get_device(),
    )  # fmt: skip
    grads, rows = as_rows(grad), as_rows(gate_up)
    grid = (grad.numel() // F, cdiv(F, config["BLOCK"]))
    _swiglu_backward_kernel[grid](grads.x, rows.x, d, *grads[1:], *rows[1:], F, **config)
    return d


def cross_compile_cases(architecture: str) -> Iterator[Case]:
    """Forward and backward at QLLaMA's width."""
    strides = {"inner": "i32", "outer_stride": "i32:16", "inner_stride": "i32:16"}
    shared = {"gate_up_ptr": "*bf16", "F": "i32:16", **strides}
    config = DEFAULTS[architecture]
    yield Case("swiglu", "forward bf16", _swiglu_kernel, shared | {"y_ptr": "*bf16"}, config)
    grads = {f"grad_{name}": kind for name, kind in strides.items()}
    backward = shared | grads | {"grad_ptr": "*bf16", "d_ptr": "*bf16"}
    yield Case("swiglu", "backward bf16", _swiglu_backward_kernel, backward, config)
