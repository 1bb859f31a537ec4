"""Residual add and RMSNorm in one pass, in Triton: kernels/add_rms_norm.py. Bound by memory."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._rows import as_rows
from ._cross_compile import Case
from ._rows import (
    add_exactly,
    empty_rows,
    persistent_programs,
    reciprocal_rms,
    row_offsets,
    tile,
)
from ._sizes import cdiv
from ._tuning import Config, launch_config
from .rms_norm import CANDIDATES, DEFAULTS, MAX_COLS, PROGRAMS_PER_PROCESSOR, TILE


@triton.jit(do_not_specialize=["num_rows", "x_inner", "r_inner"])
def _add_rms_norm_kernel(
    x_ptr, residual_ptr, scale_ptr, weight_ptr, y_ptr, residual_out_ptr, num_rows,
    x_inner, x_outer_stride, x_inner_stride, r_inner, r_outer_stride, r_inner_stride, C, eps,
    HAS_SCALE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program adds and normalises BLOCK_R rows; y, residual_out: (rows, C), contiguous."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    cols = tl.arange(0, BLOCK_C)[None, :]
    mask = (rows < num_rows) & (cols < C)
    start = row_offsets(rows, x_inner, x_outer_stride, x_inner_stride)
    x = tl.load(x_ptr + start + cols, mask=mask, other=0.0).to(tl.float32)
    start = row_offsets(rows, r_inner, r_outer_stride, r_inner_stride)
    residual = tl.load(residual_ptr + start + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_SCALE:
        x *= tl.load(scale_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)

    rounded = (residual + x).to(residual_out_ptr.dtype.element_ty)
    start = rows.to(tl.int64) * C
    tl.store(residual_out_ptr + start + cols, rounded, mask=mask)
    r = rounded.to(tl.float32)
    rstd = reciprocal_rms(r, C, eps)
    normed = (r * rstd).to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(y_ptr + start + cols, (normed * weight).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "grad_inner", "passed_inner", "x_inner"])
def _add_rms_norm_backward_kernel(
    grad_ptr, passed_ptr, x_ptr, r_ptr, scale_ptr, weight_ptr, dx_ptr, dresidual_ptr, partial_ptr,
    num_rows, grad_inner, grad_outer_stride, grad_inner_stride,
    passed_inner, passed_outer_stride, passed_inner_stride, x_inner, x_outer_stride, x_inner_stride,
    C, eps, HAS_SCALE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program differentiates every num_programs-th tile of BLOCK_R rows.

    r (residual_out), dx and dresidual are (rows, C), contiguous. partial: (2, programs, C) fp32,
    each program's shares of dweight and dscale, summed afterwards in a fixed order.
    """
    cols = tl.arange(0, BLOCK_C)[None, :]
    weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    dweight_lost = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
        dscale = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        dscale_lost = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for tile_index in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_R), tl.num_programs(0)):
        rows = tile_index * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        mask = (rows < num_rows) & (cols < C)
        dense = rows.to(tl.int64) * C
        r = tl.load(r_ptr + dense + cols, mask=mask, other=0.0).to(tl.float32)
        start = row_offsets(rows, grad_inner, grad_outer_stride, grad_inner_stride)
        grad = tl.load(grad_ptr + start + cols, mask=mask, other=0.0).to(tl.float32)
        start = row_offsets(rows, passed_inner, passed_outer_stride, passed_inner_stride)
        passed = tl.load(passed_ptr + start + cols, mask=mask, other=0.0).to(tl.float32)

        rstd = reciprocal_rms(r, C, eps)
        normed = r * rstd
        dnormed = grad * weight
        mean = tl.sum(dnormed * normed, axis=1)[:, None] / C
        dresidual = passed + rstd * (dnormed - normed * mean)
        rounded = dresidual.to(dresidual_ptr.dtype.element_ty)
        tl.store(dresidual_ptr + dense + cols, rounded, mask=mask)
        normed = normed.to(r_ptr.dtype.element_ty).to(tl.float32)
        dweight, dweight_lost = add_exactly(dweight, dweight_lost, grad * normed)
        if HAS_SCALE:
            start = row_offsets(rows, x_inner, x_outer_stride, x_inner_stride)
            x = tl.load(x_ptr + start + cols, mask=mask, other=0.0).to(tl.float32)
            dx = (dresidual * scale).to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + dense + cols, dx, mask=mask)
            dscale, dscale_lost = add_exactly(dscale, dscale_lost, dresidual * x)
    share = partial_ptr + tl.program_id(0).to(tl.int64) * C + cols
    tl.store(share, tl.sum(dweight, axis=0)[None, :], mask=cols < C)
    if HAS_SCALE:
        share += tl.num_programs(0).to(tl.int64) * C
        tl.store(share, tl.sum(dscale, axis=0)[None, :], mask=cols < C)


def add_rms_norm_triton(
    x: Tensor, residual: Tensor, scale: Tensor | None, weight: Tensor, eps: float,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the forward kernel; takes CPU tensors too under TRITON_INTERPRET=1."""
    C = x.shape[-1]
    if x.dtype == torch.float64 or x.dtype != residual.dtype or C > MAX_COLS:
        return NotImplemented
    y = empty_rows(x, torch.promote_types(x.dtype, weight.dtype))
    residual_out = empty_rows(x, x.dtype)
    if y.numel() == 0:
        return y, residual_out
    config = config or launch_config(
        "add_rms_norm", (C, x.dtype, scale is None), DEFAULTS, CANDIDATES,
        lambda config: add_rms_norm_triton(x, residual, scale, weight, eps, config), x.get_device(),
    )  # fmt: skip
    x_rows, r_rows, blocks, num_rows = as_rows(x), as_rows(residual), tile(C, TILE), y.numel() // C
    _add_rms_norm_kernel[(cdiv(num_rows, blocks["BLOCK_R"]),)](
        x_rows.x, r_rows.x, weight if scale is None else scale.contiguous(), weight.contiguous(),
        y, residual_out, num_rows, *x_rows[1:], *r_rows[1:], C, eps, scale is not None,
        **blocks, **config,
    )  # fmt: skip
    return y, residual_out


def add_rms_norm_backward_triton(
    grad: Tensor, grad_residual: Tensor, x: Tensor, residual_out: Tensor, scale: Tensor | None,
    weight: Tensor, eps: float, config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dresidual, dscale, dweight); dx and dscale are empty where there is no scale."""
    C = x.shape[-1]
    if x.dtype == torch.float64 or C > MAX_COLS:
        return NotImplemented
    dresidual = empty_rows(x, x.dtype)
    dx = torch.empty_like(dresidual) if scale is not None else x.new_empty(0)
    if dresidual.numel() == 0:
        dscale = x.new_empty(0) if scale is None else torch.zeros_like(scale)
        return dx, dresidual, dscale, torch.zeros_like(weight)
    inputs = (grad, grad_residual, x, residual_out, scale, weight, eps)
    config = config or launch_config(
        "add_rms_norm_backward", (C, x.dtype, scale is None), DEFAULTS, CANDIDATES,
        lambda config: add_rms_norm_backward_triton(*inputs, config), x.get_device(),
    )  # fmt: skip
    blocks, num_rows = tile(C, TILE), dresidual.numel() // C
    tiles = cdiv(num_rows, blocks["BLOCK_R"])
    programs = persistent_programs(x.device, tiles, PROGRAMS_PER_PROCESSOR)
    shares = (1 if scale is None else 2, programs, C)
    partial = torch.empty(shares, dtype=torch.float32, device=x.device)
    grads, passed, x_rows = as_rows(grad), as_rows(grad_residual), as_rows(x)
    _add_rms_norm_backward_kernel[(programs,)](
        grads.x, passed.x, x_rows.x, residual_out.contiguous(),
        weight if scale is None else scale.contiguous(), weight.contiguous(),
        dresidual if scale is None else dx, dresidual, partial, num_rows,
        *grads[1:], *passed[1:], *x_rows[1:], C, eps, scale is not None, **blocks, **config,
    )  # fmt: skip
    sums = partial.sum(1)
    dscale = x.new_empty(0) if scale is None else sums[1].to(scale.dtype, copy=True)
    return dx, dresidual, dscale, sums[0].to(weight.dtype, copy=True)


def cross_compile_cases(architecture: str) -> Iterator[Case]:
    """With layer scale at the vision tower's width, without at QLLaMA's."""
    strides = ("inner", "outer_stride", "inner_stride")
    kinds = ("i32", "i32:16", "i32:16")
    config = DEFAULTS[architecture]
    for C, has_scale in ((3200, True), (4096, False)):
        shared = {"num_rows": "i32", "C": "i32:16", "eps": "fp32", "HAS_SCALE": has_scale}
        shared |= dict.fromkeys(("x_ptr", "scale_ptr", "weight_ptr"), "*bf16")
        shared |= tile(C, TILE)
        label = f"C={C}{' scale' if has_scale else ''} bf16"
        forward = dict.fromkeys(("residual_ptr", "y_ptr", "residual_out_ptr"), "*bf16")
        forward |= {f"{x}_{s}": k for x in "xr" for s, k in zip(strides, kinds, strict=True)}
        kernel = _add_rms_norm_kernel
        yield Case("add_rms_norm", f"forward {label}", kernel, shared | forward, config)
        names = ("grad_ptr", "passed_ptr", "r_ptr", "dx_ptr", "dresidual_ptr")
        backward = {"partial_ptr": "*fp32", **dict.fromkeys(names, "*bf16")}
        for x in ("grad", "passed", "x"):
            backward |= {f"{x}_{s}": k for s, k in zip(strides, kinds, strict=True)}
        kernel = _add_rms_norm_backward_kernel
        yield Case("add_rms_norm", f"backward {label}", kernel, shared | backward, config)
