"""The linear layer in Triton: a persistent matrix product with its epilogue.

What it computes: kernels/linear.py. Bound by operations; at M = 1 by reading the weight.
The tiles of a group of rows are computed together, so that their weights are in L2 once. Source of
the tile order and of the persistent loop: Triton's tutorials 03 and 09.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._invariance import is_batch_invariant
from .._rows import as_rows
from ._cross_compile import Case
from ._rows import persistent_programs, row_offsets
from ._sizes import cdiv
from ._tuning import ARCHITECTURES, Config, launch_config, size_class

EPILOGUES = {"none": 0, "gelu": 1, "swiglu": 2, "gelu_tanh": 3, "gelu_quick": 4}
GELU = tl.constexpr(1)
SWIGLU = tl.constexpr(2)
GELU_TANH = tl.constexpr(3)
GELU_QUICK = tl.constexpr(4)

ROWS_FEW = 32  # up to here a tile has 16 or 32 rows and the time goes into reading the weight


def _config(m: int, n: int, k: int, warps: int, stages: int) -> Config:
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}
    return blocks | {"num_warps": warps, "num_stages": stages}


# By architecture: the largest tiles without a spill. With 128 sums a thread, as in 128 x 256 tiles,
# the epilogue's addresses no longer fit the registers. Not yet measured on a GPU.
DEFAULTS: dict[str, Config] = {
    "sm80": _config(128, 128, 64, 8, 3),
    "sm90": _config(128, 128, 64, 8, 4),
    "sm100": _config(128, 128, 64, 8, 4),
    "gfx942": _config(128, 128, 64, 8, 2),
}
DEFAULTS_SWIGLU: dict[str, Config] = {  # two accumulators: half as wide
    "sm80": _config(128, 64, 64, 8, 3),
    "sm90": _config(128, 128, 64, 8, 3),
    "sm100": _config(128, 128, 64, 8, 3),
    "gfx942": _config(128, 64, 64, 8, 2),
}
DEFAULTS_FEW: dict[str, Config] = {
    architecture: _config(16, 64, 128, 4, 2 if architecture == "gfx942" else 4)
    for architecture in ARCHITECTURES
}
DEFAULTS_FP32: dict[str, Config] = {  # no matrix unit computes in IEEE fp32
    architecture: _config(64, 64, 16, 8, 2) for architecture in ARCHITECTURES
}
CANDIDATES: list[Config] = [
    _config(m, n, k, warps, stages)
    for m, n, warps in ((64, 128, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8))
    for k, stages in ((64, 3), (64, 4), (128, 2), (32, 4))
]
CANDIDATES_FEW: list[Config] = [
    _config(16, n, k, 4, stages) for n in (32, 64, 128) for k in (64, 128, 256) for stages in (3, 4)
]


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


def _defaults(few: bool, dtype: torch.dtype, epilogue: str) -> dict[str, Config]:
    if dtype == torch.float32:
        return DEFAULTS_FP32
    if few:
        return DEFAULTS_FEW
    return DEFAULTS_SWIGLU if epilogue == "swiglu" else DEFAULTS


def linear_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, epilogue: str = "none",
    residual: Tensor | None = None, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Launches the kernel; takes CPU tensors too under TRITON_INTERPRET=1."""
    C, features = x.shape[-1], weight.shape[0]
    if x.dtype == torch.float64 or C == 0:
        return NotImplemented
    F = features // 2 if epilogue == "swiglu" else features
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty((*x.shape[:-1], F), dtype=dtype)
    if y.numel() == 0:
        return y
    rows = y.numel() // F
    few = rows <= ROWS_FEW and not is_batch_invariant()
    config = config or launch_config(
        "linear", (F, C, x.dtype, epilogue, size_class(rows)), _defaults(few, x.dtype, epilogue),
        CANDIDATES_FEW if few else CANDIDATES,
        lambda config: linear_triton(x, weight, bias, epilogue, residual, config), x.get_device(),
    )  # fmt: skip
    tiles = cdiv(rows, config["BLOCK_M"]) * cdiv(F, config["BLOCK_N"])
    x_rows = as_rows(x)
    residual_rows = (None, 1, 0, 0) if residual is None else as_rows(residual)
    _linear_kernel[(persistent_programs(x.device, tiles, 1),)](
        x_rows.x, weight.contiguous(), None if bias is None else bias.contiguous(),
        residual_rows[0], y, rows, F, C, *x_rows[1:], *residual_rows[1:],
        EPILOGUE=EPILOGUES[epilogue], **config,
    )  # fmt: skip
    return y


def cross_compile_cases(architecture: str) -> Iterator[Case]:
    """fc1 with GELU, fc2 with the residual, SwiGLU of QLLaMA, and one token."""
    pointers = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "y_ptr": "*bf16"}
    sizes = {"M": "i32", "F": "i32:16", "C": "i32:16"}
    strides = {
        f"{name}_{part}": "i32" if part == "inner" else "i32:16"
        for name in ("x", "residual")
        for part in ("inner", "outer_stride", "inner_stride")
    }
    for name, epilogue, bias, residual, defaults in (
        ("fc1 gelu", "gelu", "*bf16", None, DEFAULTS),
        ("fc1 tanh", "gelu_tanh", "*bf16", None, DEFAULTS),
        ("fc2 residual", "none", "*bf16", "*bf16", DEFAULTS),
        ("gate_up swiglu", "swiglu", None, None, DEFAULTS_SWIGLU),
        ("one token", "none", None, None, DEFAULTS_FEW),
    ):
        values = {"bias_ptr": bias, "residual_ptr": residual, "EPILOGUE": EPILOGUES[epilogue]}
        arguments = {**pointers, **sizes, **strides, **values}
        # wgmma and tcgen05 start at 64 rows; 16 rows take mma.sync, which the check does not know.
        yield Case(
            "linear", f"{name} bf16", _linear_kernel, arguments, defaults[architecture],
            matrix=defaults is not DEFAULTS_FEW, fp32=(DEFAULTS_FP32[architecture], {}),
        )  # fmt: skip
