"""Quantized weights where they lie in panels, in Triton: what linear_int8 and linear_int4 share.

A weight is (P, S, 32, 4) bytes, panels of 32 rows cut into steps of 4 bytes a row (kernels/_int8.py
and kernels/_int4.py): the bytes that a tile of 32 rows reads are one contiguous range. Tiles are
multiplied as (weight tile) @ (x tile).T: the matrix unit takes its first operand from registers,
where the weight is widened, and so nothing is written back to shared memory.
"""

from collections.abc import Iterator, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._invariance import is_batch_invariant
from .._rows import as_rows
from ._cross_compile import Case
from ._rows import persistent_programs
from ._sizes import cdiv
from ._tuning import Config, Run, launch_config, size_class
from .linear import EPILOGUES, ROWS_FEW

PANEL_ROWS = tl.constexpr(32)
STEP_BYTES = tl.constexpr(4)

Defaults = dict[str, Config]


@triton.jit
def panel_starts(features, steps):
    """Where the rows (int32) of a weight start, in bytes."""
    panels = (features // PANEL_ROWS).to(tl.int64) * steps * (PANEL_ROWS * STEP_BYTES)
    return panels + features % PANEL_ROWS * STEP_BYTES


@triton.jit
def panel_bytes(columns):
    """Where byte `columns` of a row lies behind its start."""
    return columns // STEP_BYTES * (PANEL_ROWS * STEP_BYTES) + columns % STEP_BYTES


def panel_config(m: int, n: int, k: int, warps: int, stages: int) -> Config:
    """Tiles of m rows of x, n rows of the weight and k columns."""
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}
    return blocks | {"num_warps": warps, "num_stages": stages}


def launch_panels(
    operator: str, kernel, x: Tensor, weight: Mapping[str, Tensor | int], features: int,
    bias: Tensor | None, epilogue: str, residual: Tensor | None,
    tables: tuple[Defaults, ...], candidates: tuple[list[Config], list[Config]],
    config: Config | None, again: Run,
) -> Tensor:  # fmt: skip
    """Launches a kernel that has the arguments of _linear_int8_kernel beside those of `weight`.

    Args:
        operator: the name, for tuned configurations.
        weight: what the kernel needs of the weight, by name.
        features: rows of the weight, two for each column of the result with SwiGLU.
        tables: the default configurations of many rows, few rows, float32 and SwiGLU.
        candidates: of many rows and of few.
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
    defaults = tables[_table(few, x.dtype == torch.float32, epilogue)]
    config = config or launch_config(
        operator, (F, C, x.dtype, epilogue, size_class(rows)), defaults, candidates[few], again,
        x.get_device(),
    )  # fmt: skip
    tiles = cdiv(rows, config["BLOCK_M"]) * cdiv(F, config["BLOCK_N"])
    x_rows = as_rows(x)
    residual_rows = (None, 1, 0, 0) if residual is None else as_rows(residual)
    kernel[(persistent_programs(x.device, tiles, 1),)](
        x_ptr=x_rows.x, bias_ptr=None if bias is None else bias.contiguous(),
        residual_ptr=residual_rows[0], y_ptr=y, M=rows, F=F, C=C,
        x_inner=x_rows[1], x_outer_stride=x_rows[2], x_inner_stride=x_rows[3],
        residual_inner=residual_rows[1], residual_outer_stride=residual_rows[2],
        residual_inner_stride=residual_rows[3], EPILOGUE=EPILOGUES[epilogue], **weight, **config,
    )  # fmt: skip
    return y


def _table(few: bool, is_fp32: bool, epilogue: str) -> int:
    """Which of the tables serves."""
    if is_fp32:
        return 2
    return 1 if few else 3 if epilogue == "swiglu" else 0


def panel_cases(
    operator: str, kernel, weight: Mapping[str, object], architecture: str,
    tables: tuple[Defaults, ...],
) -> Iterator[Case]:  # fmt: skip
    """fc1 with GELU, fc2 with the residual, SwiGLU of QLLaMA, and one token."""
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
    ):
        values = {"bias_ptr": bias, "residual_ptr": residual, "EPILOGUE": EPILOGUES[epilogue]}
        pointers = {"x_ptr": "*bf16", "y_ptr": "*bf16"}
        arguments = {**pointers, **sizes, **strides, **values, **weight}
        config = tables[_table(few, False, epilogue)][architecture]
        yield Case(
            operator, f"{name} bf16", kernel, arguments, config, matrix=not few,
            fp32=(tables[2][architecture], {}),
        )  # fmt: skip
