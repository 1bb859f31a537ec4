"""Activations to rows of eight bits, in Triton. What it computes: kernels/gelu_quant.py."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._rows import as_rows
from ._cross_compile import Case
from ._linear import EPILOGUES, SWIGLU, activate
from ._quantize import CANDIDATES, KINDS, block, defaults, serves, store_quantized
from ._rows import row_offsets
from ._tuning import Config, launch_config, size_class


@triton.jit(do_not_specialize=["x_inner"])
def _gelu_quant_kernel(
    x_ptr, q_ptr, scales_ptr, x_inner, x_outer_stride, x_inner_stride, C,
    EPILOGUE: tl.constexpr, LIMIT: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program activates and rounds one row of x into q (rows, C), contiguous.

    x has 2C columns with SwiGLU.
    """
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK_C)
    mask = cols < C
    start = row_offsets(row, x_inner, x_outer_stride, x_inner_stride)
    y = tl.load(x_ptr + start + cols, mask=mask, other=0.0).to(tl.float32)
    if EPILOGUE == SWIGLU:
        up = tl.load(x_ptr + start + C + cols, mask=mask, other=0.0).to(tl.float32)
        y = tl.div_rn(y, 1 + tl.exp(-y)) * up
    else:
        y = activate(y, EPILOGUE)
    store_quantized(q_ptr, scales_ptr, row.to(tl.int64), y, mask, cols, C, 1.0, LIMIT)


def gelu_quant_triton(
    x: Tensor, dtype: torch.dtype, epilogue: str = "gelu", config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Launches the kernel; takes CPU tensors too under TRITON_INTERPRET=1."""
    C = x.shape[-1] // 2 if epilogue == "swiglu" else x.shape[-1]
    if not serves(x, C, dtype):
        return NotImplemented
    q = x.new_empty((*x.shape[:-1], C), dtype=dtype)
    scales = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if q.numel() == 0:
        return q, scales.fill_(1.0)
    rows = scales.numel()
    config = config or launch_config(
        "gelu_quant", (C, x.dtype, dtype, epilogue, size_class(rows)), defaults(C), CANDIDATES,
        lambda config: gelu_quant_triton(x, dtype, epilogue, config), x.get_device(),
    )  # fmt: skip
    x_rows = as_rows(x)
    _gelu_quant_kernel[(rows,)](
        x_rows.x, q, scales, *x_rows[1:], C, EPILOGUE=EPILOGUES[epilogue], LIMIT=KINDS[dtype],
        BLOCK_C=block(C), **config,
    )  # fmt: skip
    return q, scales


def cross_compile_cases(architecture: str) -> Iterator[Case]:
    """The vision tower's MLP and QLLaMA's; in fp8 where Triton knows it."""
    strides = {"x_inner": "i32", "x_outer_stride": "i32:16", "x_inner_stride": "i32:16"}
    for C, epilogue in ((12800, "gelu"), (11008, "swiglu"), (3200, "none")):
        for kind, limit in (("i8", 127.0), ("fp8e4nv", 448.0)):
            if kind != "i8" and architecture not in ("sm90", "sm100"):
                continue
            arguments = {
                "x_ptr": "*bf16", "q_ptr": f"*{kind}", "scales_ptr": "*fp32", "C": "i32:16",
                **strides, "EPILOGUE": EPILOGUES[epilogue], "LIMIT": limit, "BLOCK_C": block(C),
            }  # fmt: skip
            config = defaults(C)[architecture]
            name = f"{epilogue} {kind} C={C} bf16"
            yield Case("gelu_quant", name, _gelu_quant_kernel, arguments, config)
