"""Linear layers with weights of 4 bits in Triton. What it computes: kernels/linear_int4.py.

The weight is widened in registers, each value rounded to the dtype of x once, as
`dequantize_int4` has it. A byte holds columns 4 apart, so the two halves meet two tiles of x.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from .._int4 import group_of
from ._cross_compile import Case
from ._linear import SWIGLU, Tables, launch_linear, linear_cases, store_tile, tile_of, tiles
from ._panels import PANEL_ROWS, STEP_BYTES, panel_bytes, panel_starts
from ._rows import row_offsets
from ._tuning import ARCHITECTURES, Config

# BLOCK_K: columns; at most 64, so that a tile has one scale a row. Not yet measured on a GPU.
DEFAULTS: dict[str, Config] = {
    "sm80": tiles(64, 64, 64, 4, 3),
    "sm90": tiles(128, 64, 64, 4, 3),
    "sm100": tiles(64, 64, 64, 4, 3),
    "gfx942": tiles(64, 64, 64, 4, 2),
}
DEFAULTS_FEW: dict[str, Config] = {
    architecture: tiles(16, 32, 64, 2, 2 if architecture == "gfx942" else 5)
    for architecture in ARCHITECTURES
}
DEFAULTS_FP32: dict[str, Config] = {
    architecture: tiles(32, 32, 32, 4, 2) for architecture in ARCHITECTURES
}
DEFAULTS_SWIGLU: dict[str, Config] = {  # two accumulators
    name: {**DEFAULTS["sm80"], "num_stages": config["num_stages"]}
    for name, config in DEFAULTS.items()
}
CANDIDATES: list[Config] = [
    tiles(m, n, 64, warps, stages)
    for m, n, warps in ((64, 64, 4), (128, 64, 4), (64, 128, 4), (128, 128, 8))
    for stages in (2, 3, 4)
]
CANDIDATES_FEW: list[Config] = [
    tiles(16, n, 64, warps, stages)
    for n, warps in ((16, 1), (32, 1), (32, 2), (64, 4))
    for stages in (3, 5, 7)
]
TABLES = Tables(
    DEFAULTS, DEFAULTS_FEW, DEFAULTS_FP32, DEFAULTS_SWIGLU, (CANDIDATES, CANDIDATES_FEW)
)


@triton.jit
def _add_product(product, packed_ptr, starts, places, mask, scales_ptr, scale_starts, low, high):
    """Adds the product of one tile of the weight with the two tiles of x to `product`."""
    packed = tl.load(packed_ptr + starts[:, None] + places, mask=mask[None, :], other=0)
    scales = tl.load(scales_ptr + scale_starts).to(tl.float32)[:, None]
    weight = ((packed & 15).to(tl.float32) - 8.0) * scales
    product = tl.dot(weight.to(low.dtype), low, product, input_precision="ieee")
    weight = ((packed >> 4).to(tl.float32) - 8.0) * scales
    return tl.dot(weight.to(low.dtype), high, product, input_precision="ieee")


@triton.jit
def _product_tile(
    x_ptr, packed_ptr, scales_ptr, x_starts, weight_starts, up_starts, scale_starts,
    up_scale_starts, C, S, GROUP: tl.constexpr, WITH_UP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(weight @ x.T, up @ x.T) of one tile (BLOCK_N, BLOCK_M) in fp32."""
    product = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k in range(tl.cdiv(C, BLOCK_K)):
        columns = k * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)  # of bytes
        mask = columns < S * STEP_BYTES
        # Byte j of a step holds columns j and 4 + j of eight.
        cols = columns // STEP_BYTES * (2 * STEP_BYTES) + columns % STEP_BYTES
        x_ptrs = x_ptr + x_starts[None, :] + cols[:, None]
        low = tl.load(x_ptrs, mask=(cols < C)[:, None], other=0.0)
        high = tl.load(x_ptrs + STEP_BYTES, mask=(cols + STEP_BYTES < C)[:, None], other=0.0)
        places = panel_bytes(columns)[None, :]
        group = k * BLOCK_K // GROUP * PANEL_ROWS
        product = _add_product(
            product, packed_ptr, weight_starts, places, mask, scales_ptr, scale_starts + group,
            low, high,
        )  # fmt: skip
        if WITH_UP:
            up = _add_product(
                up, packed_ptr, up_starts, places, mask, scales_ptr, up_scale_starts + group, low,
                high,
            )  # fmt: skip
    return product, up


@triton.jit
def _scale_starts(features, groups):
    """Where the scales (P, G, 32) of some rows start."""
    return (features // PANEL_ROWS) * groups * PANEL_ROWS + features % PANEL_ROWS


@triton.jit(do_not_specialize=["M", "x_inner", "residual_inner"])
def _linear_int4_kernel(
    x_ptr, packed_ptr, scales_ptr, bias_ptr, residual_ptr, y_ptr, M, F, C, S, groups,
    x_inner, x_outer_stride, x_inner_stride, residual_inner, residual_outer_stride,
    residual_inner_stride, GROUP: tl.constexpr, EPILOGUE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program computes every num_programs-th tile of y (M, F), contiguous.

    packed: (P, S, 32, 4), of which rows F to 2F are `up` with SwiGLU. GROUP: the columns that share
    a scale.
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
            x_ptr, packed_ptr, scales_ptr, x_starts, panel_starts(inside, S),
            panel_starts(inside + F, S), _scale_starts(inside, groups),
            _scale_starts(inside + F, groups), C, S, GROUP, EPILOGUE == SWIGLU, BLOCK_M, BLOCK_N,
            BLOCK_K,
        )  # fmt: skip
        store_tile(
            tl.trans(y), tl.trans(up), bias_ptr, residual_ptr, y_ptr, rows, features, M, F,
            residual_inner, residual_outer_stride, residual_inner_stride, EPILOGUE,
        )  # fmt: skip


def linear_int4_triton(
    x: Tensor, packed: Tensor, scales: Tensor, features: int, bias: Tensor | None = None,
    epilogue: str = "none", residual: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Launches the kernel; takes CPU tensors too under TRITON_INTERPRET=1."""
    weight: dict[str, Tensor | int] = {
        "packed_ptr": packed.contiguous(), "scales_ptr": scales.contiguous(),
        "S": packed.shape[1], "groups": scales.shape[1],
        "GROUP": group_of(packed, scales, x.shape[-1]),
    }  # fmt: skip
    return launch_linear(
        "linear_int4", _linear_int4_kernel, x, weight, features, bias, epilogue, residual,
        TABLES, config,
        lambda config: linear_int4_triton(
            x, packed, scales, features, bias, epilogue, residual, config
        ),
    )  # fmt: skip


def cross_compile_cases(architecture: str) -> Iterator[Case]:
    """The layers of linear.py's cases, in groups of 64."""
    weight = {
        "packed_ptr": "*u8", "scales_ptr": "*fp16", "S": "i32:16", "groups": "i32", "GROUP": 64,
    }  # fmt: skip
    return linear_cases("linear_int4", _linear_int4_kernel, weight, architecture, TABLES)
