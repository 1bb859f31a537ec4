"""Rotary position embedding in Triton. What it computes: kernels/rotary.py. Bound by memory."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._heads import adjacent, empty_heads, positions_stride
from ._cross_compile import Case
from ._sizes import cdiv, power_of_2
from ._tuning import ARCHITECTURES, Config, launch_config, size_class

# A token's 16 heads of q and of k a program: 32 values a thread. Not yet measured on a GPU.
DEFAULTS: dict[str, Config] = {name: {"BLOCK_H": 16, "num_warps": 4} for name in ARCHITECTURES}
CANDIDATES: list[Config] = [
    {"BLOCK_H": heads, "num_warps": warps} for heads in (4, 8, 16, 32) for warps in (2, 4, 8)
]
STRIDES = ("batch", "head", "token")


@triton.jit
def token_angles(
    cos_ptr, sin_ptr, positions_ptr, positions_stride, batch, token, HALF,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """cos and sin (1, BLOCK_D), fp32, of one token."""
    position = tl.load(positions_ptr + batch * positions_stride + token).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    at = position * HALF + columns
    cos = tl.load(cos_ptr + at, mask=columns < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, mask=columns < HALF, other=0.0).to(tl.float32)
    return cos[None, :], sin[None, :]


@triton.jit
def rotate_heads(
    x_ptr, y_ptr, x_head_stride, y_head_stride, cos, sin, heads, num_heads, HALF,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rotates the heads (BLOCK_H, 1) of one token; x_ptr and y_ptr point to it."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    mask = (heads < num_heads) & (columns < HALF)
    at = heads.to(tl.int64) * x_head_stride + columns
    x1 = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + at + HALF, mask=mask, other=0.0).to(tl.float32)
    at = heads.to(tl.int64) * y_head_stride + columns
    kind = y_ptr.dtype.element_ty
    tl.store(y_ptr + at, (x1 * cos - x2 * sin).to(kind), mask=mask)
    tl.store(y_ptr + at + HALF, (x2 * cos + x1 * sin).to(kind), mask=mask)


@triton.jit(do_not_specialize=["positions_stride", "num_tokens"])
def _rotary_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, positions_ptr, positions_stride,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    q_out_batch, q_out_head, q_out_token, k_out_batch, k_out_head, k_out_token,
    num_tokens, q_heads, k_heads, HALF, sign, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (token of the batch, block of heads) rotates BLOCK_H heads of q and of k."""
    batch = (tl.program_id(0) // num_tokens).to(tl.int64)
    token = (tl.program_id(0) % num_tokens).to(tl.int64)
    heads = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    cos, sin = token_angles(
        cos_ptr, sin_ptr, positions_ptr, positions_stride, batch, token, HALF, BLOCK_D
    )
    rotate_heads(
        q_ptr + batch * q_batch + token * q_token,
        q_out_ptr + batch * q_out_batch + token * q_out_token,
        q_head, q_out_head, cos, sin * sign, heads, q_heads, HALF, BLOCK_D,
    )  # fmt: skip
    rotate_heads(
        k_ptr + batch * k_batch + token * k_token,
        k_out_ptr + batch * k_out_batch + token * k_out_token,
        k_head, k_out_head, cos, sin * sign, heads, k_heads, HALF, BLOCK_D,
    )  # fmt: skip


def rotary_triton(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, inverse: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the kernel; takes CPU tensors too under TRITON_INTERPRET=1."""
    if q.dtype == torch.float64:
        return NotImplemented
    q_out, k_out = empty_heads(q), empty_heads(k)
    batch, _, tokens, dim = q.shape
    if q.numel() == 0 and k.numel() == 0:
        return q_out, k_out
    config = config or launch_config(
        "rotary", (q.shape[1], dim, q.dtype, size_class(batch * tokens)), DEFAULTS, CANDIDATES,
        lambda config: rotary_triton(q, k, cos, sin, positions, inverse, config), q.get_device(),
    )  # fmt: skip
    q, k, positions = adjacent(q), adjacent(k), positions.contiguous()
    heads = max(q.shape[1], k.shape[1])
    _rotary_kernel[(batch * tokens, cdiv(heads, config["BLOCK_H"]))](
        q, k, q_out, k_out, cos.contiguous(), sin.contiguous(), positions,
        positions_stride(positions), *q.stride()[:3], *k.stride()[:3], *q_out.stride()[:3],
        *k_out.stride()[:3], tokens, q.shape[1], k.shape[1], dim // 2, -1.0 if inverse else 1.0,
        BLOCK_D=power_of_2(dim // 2), **config,
    )  # fmt: skip
    return q_out, k_out


def cross_compile_cases(architecture: str) -> Iterator[Case]:
    """The heads of QLLaMA; the backward is the same kernel."""
    tensors = ("q", "k", "q_out", "k_out")
    yield Case(
        "rotary",
        "bf16 D=128",
        _rotary_kernel,
        {f"{x}_ptr": "*bf16" for x in (*tensors, "cos", "sin")}
        | {f"{x}_{stride}": "i32:16" for x in tensors for stride in STRIDES}
        | {"positions_ptr": "*i64", "positions_stride": "i32", "num_tokens": "i32"}
        | {"q_heads": "i32:16", "k_heads": "i32:16", "HALF": "i32:16", "sign": "fp32"}
        | {"BLOCK_D": 64},
        DEFAULTS[architecture],
    )
