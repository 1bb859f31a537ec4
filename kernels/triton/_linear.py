"""What the linears in Triton share, whatever form their weight has: tiles, epilogues, launches.

A persistent kernel computes tiles of y (M, F); its product is its own file's business (linear.py,
linear_int8.py, linear_int4.py). The tiles of a group of rows are computed together, so that their
weights are in L2 once. Source of the tile order and of the persistent loop: Triton's tutorials 03
and 09.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._invariance import is_batch_invariant
from .._rows import as_rows
from ._cross_compile import Case
from ._rows import persistent_programs, row_offsets
from ._sizes import cdiv
from ._tuning import Config, Run, launch_config, size_class

EPILOGUES = {"none": 0, "gelu": 1, "swiglu": 2, "gelu_tanh": 3, "gelu_quick": 4}
GELU = tl.constexpr(1)
SWIGLU = tl.constexpr(2)
GELU_TANH = tl.constexpr(3)
GELU_QUICK = tl.constexpr(4)

ROWS_FEW = 32  # up to here a tile has 16 or 32 rows and the time goes into reading the weight

Defaults = dict[str, Config]  # by architecture


class Tables(NamedTuple):
    """The configurations of a kernel: defaults of many rows, few rows, float32 and SwiGLU, whose
    second accumulator takes registers; and the tuner's candidates of many rows and of few."""

    many: Defaults
    few: Defaults
    fp32: Defaults
    swiglu: Defaults
    candidates: tuple[list[Config], list[Config]]

    def defaults(self, few: bool, is_fp32: bool, epilogue: str) -> Defaults:
        """Those that serve a call."""
        if is_fp32:
            return self.fp32
        if few:
            return self.few
        return self.swiglu if epilogue == "swiglu" else self.many


def tiles(m: int, n: int, k: int, warps: int, stages: int) -> Config:
    """Tiles of m rows of x, n rows of the weight and k columns."""
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}
    return blocks | {"num_warps": warps, "num_stages": stages}


@triton.jit
def _gelu(x):
    """x * Phi(x), exact."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def activate(x, EPILOGUE: tl.constexpr):
    """The epilogue of one column by itself.

    x / 2 * (1 + tanh(u)) is x * sigmoid(2 u), which loses nothing in the negative tail.
    """
    if EPILOGUE == GELU:
        x = _gelu(x)
    if EPILOGUE == GELU_TANH:
        x = x * tl.sigmoid(x * (1.5957691216057308 + 0.071354816272600248 * x * x))
    if EPILOGUE == GELU_QUICK:
        x = x * tl.sigmoid(1.702 * x)
    return x


@triton.jit
def tile_of(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of a tile: down a group of GROUP_M tiles, then to the next column, so that the
    weights of a column are read once for a group."""
    first_m = index // (GROUP_M * tiles_n) * GROUP_M
    group = min(tiles_m - first_m, GROUP_M)
    return first_m + index % (GROUP_M * tiles_n) % group, index % (GROUP_M * tiles_n) // group


@triton.jit
def store_tile(
    y, up, bias_ptr, residual_ptr, y_ptr, rows, features, M, F, residual_inner,
    residual_outer_stride, residual_inner_stride, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """Bias, activation and residual of a finished tile, fp32, of y (M, F), contiguous.

    up: the product with the second half of the weight, for SwiGLU. bias_ptr and residual_ptr may be
    None.
    """
    in_width = features < F
    if bias_ptr is not None:
        y += tl.load(bias_ptr + features, mask=in_width, other=0.0).to(tl.float32)[None, :]
    y = activate(y, EPILOGUE)
    if EPILOGUE == SWIGLU:
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + F + features, mask=in_width, other=0.0)
            up += bias.to(tl.float32)[None, :]
        y = y * tl.sigmoid(y) * up
    mask = (rows < M)[:, None] & in_width[None, :]
    if residual_ptr is not None:
        starts = row_offsets(rows, residual_inner, residual_outer_stride, residual_inner_stride)
        offsets = starts[:, None] + features[None, :]
        y += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    offsets = rows.to(tl.int64)[:, None] * F + features[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


def launch_linear(
    operator: str, kernel, x: Tensor, weight: Mapping[str, Tensor | int], features: int,
    bias: Tensor | None, epilogue: str, residual: Tensor | None, tables: Tables,
    config: Config | None, again: Run,
) -> Tensor:  # fmt: skip
    """Launches a kernel that has the arguments of linear.py's beside those of its weight.

    Args:
        operator: the name, for tuned configurations.
        weight: what the kernel needs of the weight, by name.
        features: rows of the weight, two for each column of the result with SwiGLU.
        tables: its configurations.
        config: what to launch with; None chooses.
        again: run(config), for the tuner.
    """
    C = x.shape[-1]
    if x.dtype == torch.float64 or C == 0:
        return NotImplemented
    F = features // 2 if epilogue == "swiglu" else features
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty((*x.shape[:-1], F), dtype=dtype)
    if y.numel() == 0:
        return y
    rows = y.numel() // F
    few = rows <= ROWS_FEW and not is_batch_invariant()
    defaults = tables.defaults(few, x.dtype == torch.float32, epilogue)
    config = config or launch_config(
        operator, (F, C, x.dtype, epilogue, size_class(rows)), defaults, tables.candidates[few],
        again, x.get_device(),
    )  # fmt: skip
    count = cdiv(rows, config["BLOCK_M"]) * cdiv(F, config["BLOCK_N"])
    x_rows = as_rows(x)
    residual_rows = (None, 1, 0, 0) if residual is None else as_rows(residual)
    kernel[(persistent_programs(x.device, count, 1),)](
        x_ptr=x_rows.x, bias_ptr=None if bias is None else bias.contiguous(),
        residual_ptr=residual_rows[0], y_ptr=y, M=rows, F=F, C=C,
        x_inner=x_rows[1], x_outer_stride=x_rows[2], x_inner_stride=x_rows[3],
        residual_inner=residual_rows[1], residual_outer_stride=residual_rows[2],
        residual_inner_stride=residual_rows[3], EPILOGUE=EPILOGUES[epilogue], **weight, **config,
    )  # fmt: skip
    return y


def linear_cases(
    operator: str, kernel, weight: Mapping[str, object], architecture: str,
    tables: Tables, more: tuple[tuple, ...] = (),
) -> Iterator[Case]:  # fmt: skip
    """fc1 with GELU, fc2 with the residual, SwiGLU of QLLaMA, and one token.

    more: others, as (name, epilogue, type of the bias, type of the residual, whether rows are few).
    """
    sizes = {"M": "i32", "F": "i32:16", "C": "i32:16"}
    strides = {
        f"{name}_{part}": "i32" if part == "inner" else "i32:16"
        for name in ("x", "residual")
        for part in ("inner", "outer_stride", "inner_stride")
    }
    for name, epilogue, bias, residual, few in (
        ("fc1 gelu", "gelu", "*bf16", None, False),
        ("fc2 residual", "none", "*bf16", "*bf16", False),
        ("gate_up swiglu", "swiglu", None, None, False),
        ("one token", "none", None, None, True),
        *more,
    ):
        values = {"bias_ptr": bias, "residual_ptr": residual, "EPILOGUE": EPILOGUES[epilogue]}
        pointers = {"x_ptr": "*bf16", "y_ptr": "*bf16"}
        arguments = {**pointers, **sizes, **strides, **values, **weight}
        config = tables.defaults(few, False, epilogue)[architecture]
        # wgmma and tcgen05 start at 64 rows; 16 rows take mma.sync, which the check does not know.
        yield Case(
            operator, f"{name} bf16", kernel, arguments, config, matrix=not few,
            fp32=(tables.fp32[architecture], {}),
        )  # fmt: skip
