"""Residual add and RMSNorm or LayerNorm in one pass, in Triton: kernels/add_rms_norm.py.

One kernel serves both norms, as in _norm.py. Bound by memory.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._rows import as_rows
from ._cross_compile import Case
from ._norm import (
    CANDIDATES,
    CANDIDATES_BACKWARD,
    DEFAULTS,
    MAX_COLS,
    PROGRAMS_PER_PROCESSOR,
    TILE,
    backward_defaults,
    backward_tile,
    differentiate,
    normalise,
)
from ._rows import add_exactly, empty_rows, persistent_programs, row_offsets, tile
from ._sizes import cdiv
from ._tuning import Config, launch_config, size_class


@triton.jit(do_not_specialize=["num_rows", "x_inner", "r_inner"])
def _add_norm_kernel(
    x_ptr, residual_ptr, scale_ptr, weight_ptr, bias_ptr, y_ptr, residual_out_ptr, num_rows,
    x_inner, x_outer_stride, x_inner_stride, r_inner, r_outer_stride, r_inner_stride, C, eps,
    CENTRED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program adds and normalises BLOCK_R rows; y, residual_out: (rows, C), contiguous.

    scale_ptr may be None, for 1.
    """
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    cols = tl.arange(0, BLOCK_C)[None, :]
    mask = (rows < num_rows) & (cols < C)
    start = row_offsets(rows, x_inner, x_outer_stride, x_inner_stride)
    x = tl.load(x_ptr + start + cols, mask=mask, other=0.0).to(tl.float32)
    start = row_offsets(rows, r_inner, r_outer_stride, r_inner_stride)
    residual = tl.load(residual_ptr + start + cols, mask=mask, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        x *= tl.load(scale_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)

    rounded = (residual + x).to(residual_out_ptr.dtype.element_ty)
    start = rows.to(tl.int64) * C
    tl.store(residual_out_ptr + start + cols, rounded, mask=mask)
    r = rounded.to(tl.float32)
    y = normalise(r, weight, bias_ptr, cols, mask, C, eps, CENTRED, x_ptr.dtype.element_ty)
    tl.store(y_ptr + start + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "grad_inner", "passed_inner", "x_inner"])
def _add_norm_backward_kernel(
    grad_ptr, passed_ptr, x_ptr, r_ptr, scale_ptr, weight_ptr, dx_ptr, dresidual_ptr, partial_ptr,
    num_rows, grad_inner, grad_outer_stride, grad_inner_stride,
    passed_inner, passed_outer_stride, passed_inner_stride, x_inner, x_outer_stride, x_inner_stride,
    C, eps, CENTRED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program differentiates every num_programs-th tile of BLOCK_R rows, STAGES in flight.

    r (residual_out), dx and dresidual are (rows, C), contiguous. partial: (vectors, programs, C)
    fp32, each program's shares of dweight, where CENTRED dbias, and with a scale dscale, summed
    afterwards in a fixed order.
    """
    cols = tl.arange(0, BLOCK_C)[None, :]
    weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    dweight_lost = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if CENTRED:
        dbias = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        dbias_lost = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
        dscale = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        dscale_lost = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    tiles = tl.cdiv(num_rows, BLOCK_R)
    for tile_index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        rows = tile_index * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        mask = (rows < num_rows) & (cols < C)
        dense = rows.to(tl.int64) * C
        r = tl.load(r_ptr + dense + cols, mask=mask, other=0.0).to(tl.float32)
        start = row_offsets(rows, grad_inner, grad_outer_stride, grad_inner_stride)
        grad = tl.load(grad_ptr + start + cols, mask=mask, other=0.0).to(tl.float32)
        start = row_offsets(rows, passed_inner, passed_outer_stride, passed_inner_stride)
        passed = tl.load(passed_ptr + start + cols, mask=mask, other=0.0).to(tl.float32)
        if scale_ptr is not None:
            start = row_offsets(rows, x_inner, x_outer_stride, x_inner_stride)
            x = tl.load(x_ptr + start + cols, mask=mask, other=0.0).to(tl.float32)

        dr, normed = differentiate(
            r, grad, weight, mask, C, eps, CENTRED, r_ptr.dtype.element_ty
        )  # fmt: skip
        dresidual = passed + dr
        rounded = dresidual.to(dresidual_ptr.dtype.element_ty)
        tl.store(dresidual_ptr + dense + cols, rounded, mask=mask)
        dweight, dweight_lost = add_exactly(dweight, dweight_lost, grad * normed)
        if CENTRED:
            dbias, dbias_lost = add_exactly(dbias, dbias_lost, grad)
        if scale_ptr is not None:
            dx = (dresidual * scale).to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + dense + cols, dx, mask=mask)
            dscale, dscale_lost = add_exactly(dscale, dscale_lost, dresidual * x)
    share = partial_ptr + tl.program_id(0).to(tl.int64) * C + cols
    tl.store(share, tl.sum(dweight, axis=0)[None, :], mask=cols < C)
    if CENTRED:
        share += tl.num_programs(0).to(tl.int64) * C
        tl.store(share, tl.sum(dbias, axis=0)[None, :], mask=cols < C)
    if scale_ptr is not None:
        share += tl.num_programs(0).to(tl.int64) * C
        tl.store(share, tl.sum(dscale, axis=0)[None, :], mask=cols < C)


def add_norm_triton(
    operator: str, x: Tensor, residual: Tensor, scale: Tensor | None, weight: Tensor,
    bias: Tensor | None, eps: float, config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the forward kernel: LayerNorm with a bias, RMSNorm without.

    Takes CPU tensors too under TRITON_INTERPRET=1. operator: the name, for tuned configurations.
    """
    C = x.shape[-1]
    if x.dtype == torch.float64 or x.dtype != residual.dtype or C > MAX_COLS:
        return NotImplemented
    y = empty_rows(x, torch.promote_types(x.dtype, weight.dtype) if bias is None else x.dtype)
    residual_out = empty_rows(x, x.dtype)
    if y.numel() == 0:
        return y, residual_out
    inputs, num_rows = (operator, x, residual, scale, weight, bias, eps), y.numel() // C
    config = config or launch_config(
        operator, (C, x.dtype, scale is None, size_class(num_rows)), DEFAULTS, CANDIDATES,
        lambda config: add_norm_triton(*inputs, config), x.get_device(),
    )  # fmt: skip
    x_rows, r_rows, blocks = as_rows(x), as_rows(residual), tile(C, TILE)
    vectors = (None if v is None else v.contiguous() for v in (scale, weight, bias))
    _add_norm_kernel[(cdiv(num_rows, blocks["BLOCK_R"]),)](
        x_rows.x, r_rows.x, *vectors, y, residual_out, num_rows, *x_rows[1:], *r_rows[1:], C, eps,
        CENTRED=bias is not None, **blocks, **config,
    )  # fmt: skip
    return y, residual_out


def add_norm_backward_triton(
    operator: str, grad: Tensor, grad_residual: Tensor, x: Tensor, residual_out: Tensor,
    scale: Tensor | None, weight: Tensor, eps: float, centred: bool, config: Config | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(dx, dresidual, dscale, dweight), with dbias where centred.

    dx and dscale are empty where there is no scale.
    """
    C = x.shape[-1]
    if x.dtype == torch.float64 or C > MAX_COLS:
        return NotImplemented
    dresidual = empty_rows(x, x.dtype)
    dx, dscale = x.new_empty(0), x.new_empty(0)
    norms = 2 if centred else 1
    vectors = norms + (scale is not None)
    if scale is not None:
        dx, dscale = torch.empty_like(dresidual), torch.zeros_like(scale)
    if dresidual.numel() == 0:
        return dx, dresidual, dscale, *(torch.zeros_like(weight) for _ in range(norms))
    inputs = (operator, grad, grad_residual, x, residual_out, scale, weight, eps, centred)
    num_rows = dresidual.numel() // C
    config = config or launch_config(
        f"{operator}_backward", (C, x.dtype, scale is None, size_class(num_rows)),
        backward_defaults(C, vectors), CANDIDATES_BACKWARD,
        lambda config: add_norm_backward_triton(*inputs, config), x.get_device(),
    )  # fmt: skip
    blocks = backward_tile(C, vectors)
    tiles = cdiv(num_rows, blocks["BLOCK_R"])
    programs = persistent_programs(x.device, tiles, PROGRAMS_PER_PROCESSOR)
    shares = (vectors, programs, C)
    partial = torch.empty(shares, dtype=torch.float32, device=x.device)
    grads, passed, x_rows = as_rows(grad), as_rows(grad_residual), as_rows(x)
    _add_norm_backward_kernel[(programs,)](
        grads.x, passed.x, x_rows.x, residual_out.contiguous(),
        None if scale is None else scale.contiguous(), weight.contiguous(),
        None if scale is None else dx, dresidual, partial, num_rows,
        *grads[1:], *passed[1:], *x_rows[1:], C, eps, CENTRED=centred, **blocks, **config,
    )  # fmt: skip
    sums = partial.sum(1)
    if scale is not None:
        dscale = sums[norms].to(scale.dtype, copy=True)
    return dx, dresidual, dscale, *(total.to(weight.dtype, copy=True) for total in sums[:norms])


def add_norm_cases(
    operator: str, sizes: tuple[tuple[int, bool], ...], architecture: str
) -> Iterator[Case]:
    """Forward and backward of (width, with a scale), for the table of compiled kernels."""
    centred = operator == "add_layer_norm"
    integers = {"num_rows": "i32", "C": "i32:16", "eps": "fp32"}

    def rows(name: str) -> dict[str, str]:
        strides = ("inner", "outer_stride", "inner_stride")
        return {f"{name}_{part}": "i32" if part == "inner" else "i32:16" for part in strides}

    for C, has_scale in sizes:
        scale = "*bf16" if has_scale else None
        shared = {
            "x_ptr": "*bf16", "scale_ptr": scale, "weight_ptr": "*bf16", **rows("x"), **integers,
            **tile(C, TILE), "CENTRED": centred,
        }  # fmt: skip
        name = f"C={C} {'scale' if has_scale else 'no scale'} bf16"
        config = DEFAULTS[architecture]
        forward = {
            **shared, **rows("r"), "residual_ptr": "*bf16", "y_ptr": "*bf16",
            "residual_out_ptr": "*bf16", "bias_ptr": "*bf16" if centred else None,
        }  # fmt: skip
        yield Case(operator, f"forward {name}", _add_norm_kernel, forward, config)
        backward = {
            **shared, **rows("grad"), **rows("passed"), "grad_ptr": "*bf16", "passed_ptr": "*bf16",
            "r_ptr": "*bf16", "dx_ptr": scale, "dresidual_ptr": "*bf16", "partial_ptr": "*fp32",
        }  # fmt: skip
        vectors = 1 + centred + has_scale
        config = backward_defaults(C, vectors)[architecture]
        backward |= backward_tile(C, vectors)
        yield Case(operator, f"backward {name}", _add_norm_backward_kernel, backward, config)
