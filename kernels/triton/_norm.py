"""RMSNorm and LayerNorm in Triton: kernels/rms_norm.py and kernels/layer_norm.py.

One kernel serves both; LayerNorm (CENTRED) takes the mean from the row first and adds a bias. Bound
by memory.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._rows import as_rows
from ._cross_compile import Case
from ._rows import (
    add_exactly,
    centre,
    empty_rows,
    persistent_programs,
    reciprocal_rms,
    row_offsets,
    tile,
)
from ._sizes import cdiv
from ._tuning import Config, launch_config, size_class

# One row of 3200 or 4096 a program: 16 values a thread at 8 warps. Not yet measured on a GPU.
DEFAULTS: dict[str, Config] = {
    "sm80": {"num_warps": 8},
    "sm90": {"num_warps": 8},
    "sm100": {"num_warps": 8},
    "gfx942": {"num_warps": 8},
}
CANDIDATES: list[Config] = [{"num_warps": warps} for warps in (2, 4, 8, 16)]
# Backward, with the loads of the next rows under way, in shared memory, while one is reduced; a row
# in 16 warps is 8 values a thread.
DEFAULTS_BACKWARD: dict[str, Config] = {
    "sm80": {"num_warps": 16, "STAGES": 2},
    "sm90": {"num_warps": 16, "STAGES": 3},
    "sm100": {"num_warps": 16, "STAGES": 2},
    "gfx942": {"num_warps": 8, "STAGES": 1},
}
DEFAULTS_BACKWARD_LARGE: dict[str, Config] = {  # of which 16 warps cannot hold one in registers
    name: {"num_warps": 8, "STAGES": 1} for name in DEFAULTS_BACKWARD
}
CANDIDATES_BACKWARD: list[Config] = [
    {"num_warps": warps, "STAGES": stages} for warps in (4, 8, 16) for stages in (1, 2, 3)
]
MAX_COLS = 32768  # beyond, a row no longer fits the registers; the next backend serves
TILE = 4096  # values a program holds at once
PROGRAMS_PER_PROCESSOR = 2  # backward: as many as are resident, each with a row of dweight


@triton.jit
def normalise(x, weight, bias_ptr, cols, mask, C, eps, CENTRED: tl.constexpr, DTYPE: tl.constexpr):
    """The rows of x, in fp32 and 0 outside of mask, normalised; RMSNorm rounds before weight."""
    if CENTRED:
        x = centre(x, mask, C)
        bias = tl.load(bias_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
        y = tl.fma(x * reciprocal_rms(x, C, eps), weight, bias)
    else:
        rstd = reciprocal_rms(x, C, eps)
        y = (x * rstd).to(DTYPE).to(tl.float32) * weight
    return y


@triton.jit
def differentiate(x, grad, weight, mask, C, eps, CENTRED: tl.constexpr, DTYPE: tl.constexpr):
    """(the gradient of x, what multiplies grad in that of weight); x, grad as `normalise` has x."""
    if CENTRED:
        x = centre(x, mask, C)
    rstd = reciprocal_rms(x, C, eps)
    normed = x * rstd
    dnormed = grad * weight
    mean = tl.sum(dnormed * normed, axis=1)[:, None] / C
    dx = dnormed - normed * mean
    if CENTRED:
        dx -= tl.sum(dnormed, axis=1)[:, None] / C
    else:
        normed = normed.to(DTYPE).to(tl.float32)
    return rstd * dx, normed


@triton.jit(do_not_specialize=["num_rows", "x_inner"])
def _norm_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, num_rows, x_inner, x_outer_stride, x_inner_stride, C, eps,
    CENTRED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program normalises BLOCK_R rows of x into y (rows, C), contiguous."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    cols = tl.arange(0, BLOCK_C)[None, :]
    mask = (rows < num_rows) & (cols < C)
    start = row_offsets(rows, x_inner, x_outer_stride, x_inner_stride)
    x = tl.load(x_ptr + start + cols, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    y = normalise(x, weight, bias_ptr, cols, mask, C, eps, CENTRED, x_ptr.dtype.element_ty)
    tl.store(y_ptr + rows.to(tl.int64) * C + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "grad_inner", "x_inner"])
def _norm_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, dx_ptr, partial_ptr, num_rows,
    grad_inner, grad_outer_stride, grad_inner_stride, x_inner, x_outer_stride, x_inner_stride,
    C, eps, CENTRED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program differentiates every num_programs-th tile of BLOCK_R rows, STAGES in flight.

    dx: (rows, C), contiguous. partial: (1, programs, C) fp32, each program's share of dweight, or
    (2, programs, C) with that of dbias; summed in a fixed order, so the result is the same on every
    run.
    """
    cols = tl.arange(0, BLOCK_C)[None, :]
    weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    lost = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if CENTRED:
        dbias = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        dbias_lost = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    tiles = tl.cdiv(num_rows, BLOCK_R)
    for tile_index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        rows = tile_index * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        mask = (rows < num_rows) & (cols < C)
        start = row_offsets(rows, x_inner, x_outer_stride, x_inner_stride)
        x = tl.load(x_ptr + start + cols, mask=mask, other=0.0).to(tl.float32)
        start = row_offsets(rows, grad_inner, grad_outer_stride, grad_inner_stride)
        grad = tl.load(grad_ptr + start + cols, mask=mask, other=0.0).to(tl.float32)

        dx, normed = differentiate(
            x, grad, weight, mask, C, eps, CENTRED, x_ptr.dtype.element_ty
        )  # fmt: skip
        dx = dx.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + rows.to(tl.int64) * C + cols, dx, mask=mask)
        dweight, lost = add_exactly(dweight, lost, grad * normed)
        if CENTRED:
            dbias, dbias_lost = add_exactly(dbias, dbias_lost, grad)
    share = partial_ptr + tl.program_id(0).to(tl.int64) * C + cols
    tl.store(share, tl.sum(dweight, axis=0)[None, :], mask=cols < C)
    if CENTRED:
        share += tl.num_programs(0).to(tl.int64) * C
        tl.store(share, tl.sum(dbias, axis=0)[None, :], mask=cols < C)


def norm_triton(
    operator: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Launches the forward kernel: LayerNorm with a bias, RMSNorm without.

    Takes CPU tensors too under TRITON_INTERPRET=1. operator: the name, for tuned configurations.
    """
    C = x.shape[-1]
    if x.dtype == torch.float64 or C > MAX_COLS:
        return NotImplemented
    y = empty_rows(x, torch.promote_types(x.dtype, weight.dtype) if bias is None else x.dtype)
    if y.numel() == 0:
        return y
    rows = y.numel() // C
    config = config or launch_config(
        operator, (C, x.dtype, size_class(rows)), DEFAULTS, CANDIDATES,
        lambda config: norm_triton(operator, x, weight, bias, eps, config), x.get_device(),
    )  # fmt: skip
    x_rows, blocks = as_rows(x), tile(C, TILE)
    _norm_kernel[(cdiv(rows, blocks["BLOCK_R"]),)](
        x_rows.x, weight.contiguous(), None if bias is None else bias.contiguous(), y, rows,
        *x_rows[1:], C, eps, CENTRED=bias is not None, **blocks, **config,
    )  # fmt: skip
    return y


def norm_backward_triton(
    operator: str, grad: Tensor, x: Tensor, weight: Tensor, eps: float, centred: bool,
    config: Config | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(dx, dweight), with dbias where centred.

    The sums are reduced in two steps, in the same order on every run.
    """
    C = x.shape[-1]
    if x.dtype == torch.float64 or C > MAX_COLS:
        return NotImplemented
    dx = empty_rows(x, x.dtype)
    vectors = 2 if centred else 1
    if dx.numel() == 0:
        return dx, *(torch.zeros_like(weight) for _ in range(vectors))
    rows = dx.numel() // C
    config = config or launch_config(
        f"{operator}_backward", (C, x.dtype, size_class(rows)), backward_defaults(C, vectors),
        CANDIDATES_BACKWARD,
        lambda config: norm_backward_triton(operator, grad, x, weight, eps, centred, config),
        x.get_device(),
    )  # fmt: skip
    grad_rows, x_rows, blocks = as_rows(grad), as_rows(x), backward_tile(C, vectors)
    programs = persistent_programs(x.device, cdiv(rows, blocks["BLOCK_R"]), PROGRAMS_PER_PROCESSOR)
    partial = torch.empty((vectors, programs, C), dtype=torch.float32, device=x.device)
    _norm_backward_kernel[(programs,)](
        grad_rows.x, x_rows.x, weight.contiguous(), dx, partial, rows, *grad_rows[1:], *x_rows[1:],
        C, eps, CENTRED=centred, **blocks, **config,
    )  # fmt: skip
    return dx, *(total.to(weight.dtype, copy=True) for total in partial.sum(1))


def backward_tile(C: int, vectors: int) -> dict[str, int]:
    """The blocks of a kernel that sums the gradients of so many vectors: less of them, of three."""
    return tile(C, TILE if vectors < 3 else TILE // 2)


def backward_defaults(C: int, vectors: int) -> dict[str, Config]:
    """Its configurations."""
    blocks = backward_tile(C, vectors)
    values = blocks["BLOCK_R"] * blocks["BLOCK_C"]
    large = values > TILE or vectors * values > 2 * TILE
    return DEFAULTS_BACKWARD_LARGE if large else DEFAULTS_BACKWARD


def norm_cases(operator: str, widths: tuple[int, ...], architecture: str) -> Iterator[Case]:
    """Forward and backward of one operator for the table of compiled kernels."""
    centred = operator == "layer_norm"
    integers = {"num_rows": "i32", "C": "i32:16", "eps": "fp32"}
    for C in widths:
        x = {"x_inner": "i32", "x_outer_stride": "i32:16", "x_inner_stride": "i32:16"}
        grad = {name.replace("x_", "grad_", 1): kind for name, kind in x.items()}
        shared = {
            "x_ptr": "*bf16", "weight_ptr": "*bf16", **x, **integers, **tile(C, TILE),
            "CENTRED": centred,
        }  # fmt: skip
        config = DEFAULTS[architecture]
        forward = {**shared, "y_ptr": "*bf16", "bias_ptr": "*bf16" if centred else None}
        yield Case(operator, f"forward C={C} bf16", _norm_kernel, forward, config)
        vectors = 2 if centred else 1
        backward = {
            **shared, **grad, "grad_ptr": "*bf16", "dx_ptr": "*bf16", "partial_ptr": "*fp32",
            **backward_tile(C, vectors),
        }  # fmt: skip
        config = backward_defaults(C, vectors)[architecture]
        yield Case(operator, f"backward C={C} bf16", _norm_backward_kernel, backward, config)
