"""RMSNorm to rows of eight bits, in Triton. What it computes: kernels/rms_norm_quant.py."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._rows import as_rows
from ._cross_compile import Case
from ._quantize import CANDIDATES, KINDS, block, defaults, serves, store_quantized
from ._rows import row_offsets
from ._tuning import Config, launch_config, size_class


@triton.jit(do_not_specialize=["x_inner"])
def _rms_norm_quant_kernel(
    x_ptr, weight_ptr, q_ptr, scales_ptr, x_inner, x_outer_stride, x_inner_stride, C, eps,
    LIMIT: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program normalises and rounds one row of x into q (rows, C), contiguous."""
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK_C)
    mask = cols < C
    start = row_offsets(row, x_inner, x_outer_stride, x_inner_stride)
    x = tl.load(x_ptr + start + cols, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(x * x, axis=0), tl.cast(C, tl.float32))
    rstd = tl.rsqrt(mean + eps)
    store_quantized(
        q_ptr, scales_ptr, row.to(tl.int64), x * weight, mask, cols, C, rstd, LIMIT
    )  # fmt: skip


def rms_norm_quant_triton(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, config: Config | None = None
) -> tuple[Tensor, Tensor]:
    """Launches the kernel; takes CPU tensors too under TRITON_INTERPRET=1."""
    C = x.shape[-1]
    if not serves(x, C, dtype):
        return NotImplemented
    q = x.new_empty(x.shape, dtype=dtype)
    scales = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if q.numel() == 0:
        return q, scales.fill_(1.0)
    rows = scales.numel()
    config = config or launch_config(
        "rms_norm_quant", (C, x.dtype, dtype, size_class(rows)), defaults(C), CANDIDATES,
        lambda config: rms_norm_quant_triton(x, weight, eps, dtype, config), x.get_device(),
    )  # fmt: skip
    x_rows = as_rows(x)
    _rms_norm_quant_kernel[(rows,)](
        x_rows.x, weight.contiguous(), q, scales, *x_rows[1:], C, eps, LIMIT=KINDS[dtype],
        BLOCK_C=block(C), **config,
    )  # fmt: skip
    return q, scales


def cross_compile_cases(architecture: str) -> Iterator[Case]:
    """At the widths of the vision tower and of QLLaMA; in fp8 where Triton knows it."""
    strides = {"x_inner": "i32", "x_outer_stride": "i32:16", "x_inner_stride": "i32:16"}
    for C in (3200, 4096):
        for kind, limit in (("i8", 127.0), ("fp8e4nv", 448.0)):
            if kind != "i8" and architecture not in ("sm90", "sm100"):
                continue
            arguments = {
                "x_ptr": "*bf16", "weight_ptr": "*bf16", "q_ptr": f"*{kind}", "eps": "fp32",
                "scales_ptr": "*fp32", "C": "i32:16", **strides, "LIMIT": limit,
                "BLOCK_C": block(C),
            }  # fmt: skip
            config = defaults(C)[architecture]
            yield Case(
                "rms_norm_quant", f"{kind} C={C} bf16", _rms_norm_quant_kernel, arguments, config
            )
