"""Linear layers with weights of 8 bits in Triton. What it computes: kernels/linear_int8.py.

The weight is widened in registers, 127 codes that 16 bits hold exactly, and x stays as it is: rows
with outlier channels keep their small values. The row's scale meets the fp32 sum. Reads a byte a
weight: twice as fast as 16 bits where that bounds it, and about as fast where operations do; for
those Hopper has fp8.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ._cross_compile import Case
from ._linear import SWIGLU, Tables, launch_linear, linear_cases, store_tile, tile_of, tiles
from ._panels import panel_bytes, panel_starts
from ._rows import row_offsets
from ._tuning import ARCHITECTURES, Config

# Not yet measured on a GPU.
DEFAULTS: dict[str, Config] = {
    "sm80": tiles(64, 64, 64, 4, 3),
    "sm90": tiles(128, 64, 64, 4, 3),
    "sm100": tiles(128, 64, 64, 4, 3),
    "gfx942": tiles(64, 64, 64, 4, 2),
}
DEFAULTS_FEW: dict[str, Config] = {
    architecture: tiles(16, 32, 256, 4, 2 if architecture == "gfx942" else 4)
    for architecture in ARCHITECTURES
}
DEFAULTS_FP32: dict[str, Config] = {
    architecture: tiles(32, 64, 16, 4, 2) for architecture in ARCHITECTURES
}
DEFAULTS_SWIGLU: dict[str, Config] = {  # two accumulators
    name: {**DEFAULTS["sm80"], "num_stages": config["num_stages"]}
    for name, config in DEFAULTS.items()
}
CANDIDATES: list[Config] = [
    tiles(m, n, k, warps, stages)
    for m, n, warps in ((64, 64, 4), (128, 64, 4), (64, 128, 4), (128, 128, 8))
    for k, stages in ((64, 3), (64, 4), (128, 2))
]
CANDIDATES_FEW: list[Config] = [
    tiles(16, n, k, 4, stages) for n in (32, 64, 128) for k in (128, 256) for stages in (3, 4, 5)
]
TABLES = Tables(
    DEFAULTS, DEFAULTS_FEW, DEFAULTS_FP32, DEFAULTS_SWIGLU, (CANDIDATES, CANDIDATES_FEW)
)


@triton.jit
def _product_tile(
    x_ptr, packed_ptr, x_starts, weight_starts, up_starts, C,
    WITH_UP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(weight @ x.T, up @ x.T) of one tile (BLOCK_N, BLOCK_M) in fp32, without scales."""
    product = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(tl.cdiv(C, BLOCK_K)):
        cols = k * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = cols < C
        x = tl.load(x_ptr + x_starts[None, :] + cols[:, None], mask=mask[:, None], other=0.0)
        places = panel_bytes(cols)[None, :]
        weight = tl.load(packed_ptr + weight_starts[:, None] + places, mask=mask[None, :], other=0)
        product = tl.dot(weight.to(x.dtype), x, product, input_precision="ieee")
        if WITH_UP:
            weight = tl.load(packed_ptr + up_starts[:, None] + places, mask=mask[None, :], other=0)
            up = tl.dot(weight.to(x.dtype), x, up, input_precision="ieee")
    return product, up


@triton.jit(do_not_specialize=["M", "x_inner", "residual_inner"])
def _linear_int8_kernel(
    x_ptr, packed_ptr, scales_ptr, bias_ptr, residual_ptr, y_ptr, M, F, C, S,
    x_inner, x_outer_stride, x_inner_stride, residual_inner, residual_outer_stride,
    residual_inner_stride, EPILOGUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program computes every num_programs-th tile of y (M, F), contiguous.

    packed: (P, S, 32, 4), of which rows F to 2F are `up` with SwiGLU.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(F, BLOCK_N)
    for index in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_of(index, tiles_m, tiles_n, GROUP_M)
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        features = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        # Beyond the edge the last row is computed again and not stored: no mask in the loop.
        x_starts = row_offsets(tl.minimum(rows, M - 1), x_inner, x_outer_stride, x_inner_stride)
        inside = tl.minimum(features, F - 1)
        y, up = _product_tile(
            x_ptr, packed_ptr, x_starts, panel_starts(inside, S), panel_starts(inside + F, S), C,
            EPILOGUE == SWIGLU, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        y = tl.trans(y * tl.load(scales_ptr + inside)[:, None])
        if EPILOGUE == SWIGLU:
            up = up * tl.load(scales_ptr + F + inside)[:, None]
        store_tile(
            y, tl.trans(up), bias_ptr, residual_ptr, y_ptr, rows, features, M, F, residual_inner,
            residual_outer_stride, residual_inner_stride, EPILOGUE,
        )  # fmt: skip


def linear_int8_triton(
    x: Tensor, packed: Tensor, scales: Tensor, sums: Tensor, bias: Tensor | None = None,
    epilogue: str = "none", residual: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Launches the kernel; takes CPU tensors too under TRITON_INTERPRET=1. sums: not needed."""
    weight = {"packed_ptr": packed.contiguous(), "scales_ptr": scales.contiguous()}
    return launch_linear(
        "linear_int8", _linear_int8_kernel, x, {**weight, "S": packed.shape[1]}, scales.shape[0],
        bias, epilogue, residual, TABLES, config,
        lambda config: linear_int8_triton(
            x, packed, scales, sums, bias, epilogue, residual, config
        ),
    )  # fmt: skip


def cross_compile_cases(architecture: str) -> Iterator[Case]:
    """The layers of linear.py's cases."""
    weight = {"packed_ptr": "*i8", "scales_ptr": "*fp32", "S": "i32:16"}
    return linear_cases("linear_int8", _linear_int8_kernel, weight, architecture, TABLES)
