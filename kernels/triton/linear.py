"""The linear layer in Triton: a persistent matrix product with its epilogue.

What it computes: kernels/linear.py. Bound by operations; at M = 1 by reading the weight.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ._cross_compile import Case
from ._linear import SWIGLU, Tables, launch_linear, linear_cases, store_tile, tile_of, tiles
from ._rows import row_offsets
from ._tuning import ARCHITECTURES, Config

# By architecture: the largest tiles without a spill. With 128 sums a thread, as in 128 x 256 tiles,
# the epilogue's addresses no longer fit the registers. Not yet measured on a GPU.
DEFAULTS: dict[str, Config] = {
    "sm80": tiles(128, 128, 64, 8, 3),
    "sm90": tiles(128, 128, 64, 8, 4),
    "sm100": tiles(128, 128, 64, 8, 4),
    "gfx942": tiles(128, 128, 64, 8, 2),
}
DEFAULTS_SWIGLU: dict[str, Config] = {  # two accumulators: half as wide
    "sm80": tiles(128, 64, 64, 8, 3),
    "sm90": tiles(128, 128, 64, 8, 3),
    "sm100": tiles(128, 128, 64, 8, 3),
    "gfx942": tiles(128, 64, 64, 8, 2),
}
DEFAULTS_FEW: dict[str, Config] = {
    architecture: tiles(16, 64, 128, 4, 2 if architecture == "gfx942" else 4)
    for architecture in ARCHITECTURES
}
DEFAULTS_FP32: dict[str, Config] = {  # no matrix unit computes in IEEE fp32
    architecture: tiles(64, 64, 16, 8, 2) for architecture in ARCHITECTURES
}
CANDIDATES: list[Config] = [
    tiles(m, n, k, warps, stages)
    for m, n, warps in ((64, 128, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8))
    for k, stages in ((64, 3), (64, 4), (128, 2), (32, 4))
]
CANDIDATES_FEW: list[Config] = [
    tiles(16, n, k, 4, stages) for n in (32, 64, 128) for k in (64, 128, 256) for stages in (3, 4)
]
TABLES = Tables(
    DEFAULTS, DEFAULTS_FEW, DEFAULTS_FP32, DEFAULTS_SWIGLU, (CANDIDATES, CANDIDATES_FEW)
)


@triton.jit
def _product_tile(
    x_ptr, weight_ptr, up_ptr, x_starts, weight_starts, C,
    WITH_UP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(x @ weight.T, x @ up.T) of one tile, in fp32; the second only where WITH_UP."""
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(tl.cdiv(C, BLOCK_K)):
        cols = k * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = cols < C
        x = tl.load(x_ptr + x_starts[:, None] + cols[None, :], mask=mask[None, :], other=0.0)
        offsets = weight_starts[None, :] + cols[:, None]
        weight = tl.load(weight_ptr + offsets, mask=mask[:, None], other=0.0)
        product = tl.dot(x, weight, product, input_precision="ieee")
        if WITH_UP:
            weight = tl.load(up_ptr + offsets, mask=mask[:, None], other=0.0)
            up = tl.dot(x, weight, up, input_precision="ieee")
    return product, up


@triton.jit(do_not_specialize=["M", "x_inner", "residual_inner"])
def _linear_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, y_ptr, M, F, C,
    x_inner, x_outer_stride, x_inner_stride, residual_inner, residual_outer_stride,
    residual_inner_stride, EPILOGUE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program computes every num_programs-th tile of y (M, F), contiguous.

    weight: (F, C), or (2F, C) of which the second half is `up` with SwiGLU. bias_ptr and
    residual_ptr may be None.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(F, BLOCK_N)
    up_ptr = weight_ptr + tl.cast(F, tl.int64) * C  # F = 1 is no tensor but a constant
    for index in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = tile_of(index, tiles_m, tiles_n, GROUP_M)
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        features = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        # Beyond the edge the last row is computed again and not stored: no mask in the loop.
        x_starts = row_offsets(tl.minimum(rows, M - 1), x_inner, x_outer_stride, x_inner_stride)
        weight_starts = tl.minimum(features, F - 1).to(tl.int64) * C
        y, up = _product_tile(
            x_ptr, weight_ptr, up_ptr, x_starts, weight_starts, C, EPILOGUE == SWIGLU,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        store_tile(
            y, up, bias_ptr, residual_ptr, y_ptr, rows, features, M, F, residual_inner,
            residual_outer_stride, residual_inner_stride, EPILOGUE,
        )  # fmt: skip


def linear_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, epilogue: str = "none",
    residual: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Launches the kernel; takes CPU tensors too under TRITON_INTERPRET=1."""
    return launch_linear(
        "linear", _linear_kernel, x, {"weight_ptr": weight.contiguous()}, weight.shape[0], bias,
        epilogue, residual, TABLES, config,
        lambda config: linear_triton(x, weight, bias, epilogue, residual, config),
    )  # fmt: skip


def cross_compile_cases(architecture: str) -> Iterator[Case]:
    """Those of every linear, and fc1 with the tanh GELU."""
    more = (("fc1 tanh", "gelu_tanh", "*bf16", None, False),)
    weight = {"weight_ptr": "*bf16"}
    return linear_cases("linear", _linear_kernel, weight, architecture, TABLES, more)
