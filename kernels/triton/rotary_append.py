"""Rotary embedding and the write to the KV cache, in Triton: kernels/rotary_append.py."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._heads import adjacent, empty_heads, positions_stride, slots_stride
from ._cross_compile import Case
from ._sizes import cdiv, power_of_2
from ._tuning import ARCHITECTURES, Config, launch_config, size_class
from .rotary import STRIDES, rotate_heads, token_angles

# Decoding is bound by the launch: few heads a program fill more processors. Not yet measured.
DEFAULTS: dict[str, Config] = {name: {"BLOCK_H": 8, "num_warps": 4} for name in ARCHITECTURES}
CANDIDATES: list[Config] = [
    {"BLOCK_H": heads, "num_warps": warps} for heads in (2, 4, 8, 16, 32) for warps in (1, 2, 4, 8)
]


@triton.jit(do_not_specialize=["positions_stride", "slots_stride", "num_tokens"])
def _rotary_append_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, k_cache_ptr, v_cache_ptr, cos_ptr, sin_ptr, positions_ptr,
    slots_ptr, positions_stride, slots_stride, q_batch, q_head, q_token, k_batch, k_head, k_token,
    v_batch, v_head, v_token, y_batch, y_head, y_token, k_cache_batch, k_cache_head, k_cache_token,
    v_cache_batch, v_cache_head, v_cache_token, num_tokens, q_heads, k_heads, HALF,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (token of the batch, block of heads) does BLOCK_H heads of q, k and v."""
    batch = (tl.program_id(0) // num_tokens).to(tl.int64)
    token = (tl.program_id(0) % num_tokens).to(tl.int64)
    heads = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    slot = tl.load(slots_ptr + batch * slots_stride + token).to(tl.int64)
    cos, sin = token_angles(
        cos_ptr, sin_ptr, positions_ptr, positions_stride, batch, token, HALF, BLOCK_D
    )
    rotate_heads(
        q_ptr + batch * q_batch + token * q_token, y_ptr + batch * y_batch + token * y_token,
        q_head, y_head, cos, sin, heads, q_heads, HALF, BLOCK_D,
    )  # fmt: skip
    rotate_heads(
        k_ptr + batch * k_batch + token * k_token,
        k_cache_ptr + batch * k_cache_batch + slot * k_cache_token,
        k_head, k_cache_head, cos, sin, heads, k_heads, HALF, BLOCK_D,
    )  # fmt: skip
    columns = tl.arange(0, 2 * BLOCK_D)[None, :]
    mask = (heads < k_heads) & (columns < 2 * HALF)
    source = v_ptr + batch * v_batch + token * v_token
    v = tl.load(source + heads.to(tl.int64) * v_head + columns, mask=mask)
    to = v_cache_ptr + batch * v_cache_batch + slot * v_cache_token
    tl.store(to + heads.to(tl.int64) * v_cache_head + columns, v, mask=mask)


def rotary_append_triton(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor,
    k_cache: Tensor, v_cache: Tensor, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Launches the kernel; takes CPU tensors too under TRITON_INTERPRET=1."""
    if q.dtype == torch.float64:
        return NotImplemented
    y = empty_heads(q)
    batch, heads, tokens, dim = q.shape
    if y.numel() == 0:
        return y
    inputs = (q, k, v, cos, sin, positions, slots, k_cache, v_cache)
    config = config or launch_config(
        "rotary_append", (heads, dim, q.dtype, size_class(batch * tokens)), DEFAULTS, CANDIDATES,
        lambda config: rotary_append_triton(*inputs, config), q.get_device(),
    )  # fmt: skip
    q, k, v, positions = adjacent(q), adjacent(k), adjacent(v), positions.contiguous()
    _rotary_append_kernel[(batch * tokens, cdiv(max(heads, k.shape[1]), config["BLOCK_H"]))](
        q, k, v, y, k_cache, v_cache, cos.contiguous(), sin.contiguous(), positions,
        slots.contiguous(), positions_stride(positions), slots_stride(slots), *q.stride()[:3],
        *k.stride()[:3], *v.stride()[:3], *y.stride()[:3], *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        tokens, heads, k.shape[1], dim // 2, BLOCK_D=power_of_2(dim // 2), **config,
    )  # fmt: skip
    return y


def cross_compile_cases(architecture: str) -> Iterator[Case]:
    """The heads of QLLaMA."""
    tensors = ("q", "k", "v", "y", "k_cache", "v_cache")
    yield Case(
        "rotary_append",
        "bf16 D=128",
        _rotary_append_kernel,
        {f"{x}_ptr": "*bf16" for x in (*tensors, "cos", "sin")}
        | {f"{x}_{stride}": "i32:16" for x in tensors for stride in STRIDES}
        | {"positions_ptr": "*i64", "slots_ptr": "*i64"}
        | {"positions_stride": "i32", "slots_stride": "i32"}
        | {"num_tokens": "i32", "q_heads": "i32:16", "k_heads": "i32:16", "HALF": "i32:16"}
        | {"BLOCK_D": 64},
        DEFAULTS[architecture],
    )
