"""decode_attention in Triton. What it computes: kernels/decode_attention.py.

Bound by memory: every key and value that is valid is read once; heads that share them run beside
each other and find them in the cache. A query times a block of keys is a sum over D in fp32,
without the matrix unit, which one row would leave idle at 15 of 16.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ._attention_combine import combine, partial_outputs, split_keys
from ._attention_core import (
    LOG2E,
    LOWEST,
    contiguous,
    exp2,
    length_class,
    load_row,
    load_tile,
    log_sum_exp,
    supported,
)
from ._cross_compile import Case
from ._sizes import power_of_2
from ._tuning import ARCHITECTURES, Config, launch_config, size_class
from .attention import as_bytes, readable

DEFAULTS = dict.fromkeys(ARCHITECTURES, {"BLOCK_N": 64, "num_warps": 4, "num_stages": 2})
CANDIDATES = [
    {"BLOCK_N": block, "num_warps": num_warps, "num_stages": num_stages}
    for block in (16, 32, 64, 128)
    for num_warps in (2, 4, 8)
    for num_stages in (1, 2, 3)
]
SPLIT_FROM = 512  # slots: up to here the second kernel costs as much as it saves


@triton.jit(do_not_specialize=["H", "T", "plane", "keys_per_part"])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, key_padding_mask_ptr, out_ptr, lse_ptr,
    q_batch_stride, q_head_stride, k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride, H, T, scale, plane, keys_per_part,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PADDED: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """One program: the query of one head against part program_id(1) of its keys."""
    head = (tl.program_id(0) % H).to(tl.int64)
    batch = (tl.program_id(0) // H).to(tl.int64)
    q = load_row(q_ptr + batch * q_batch_stride + head * q_head_stride, D, BLOCK_D)
    q *= scale * LOG2E
    k_ptr += batch * k_batch_stride + head // GROUP * k_head_stride
    v_ptr += batch * v_batch_stride + head // GROUP * v_head_stride
    first = tl.program_id(1) * keys_per_part
    end = tl.minimum(first + keys_per_part, T)
    if lengths_ptr is not None:
        end = tl.minimum(end, tl.load(lengths_ptr + batch).to(tl.int32))
    largest = tl.zeros([1], tl.float32) + LOWEST
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, keys, k_stride, end, D, BLOCK_D, MASKED=True).to(tl.float32)
        v = load_tile(v_ptr, keys, v_stride, end, D, BLOCK_D, MASKED=True).to(tl.float32)
        seen = keys < end
        if PADDED:
            real = tl.load(key_padding_mask_ptr + batch * T + keys, mask=seen, other=0)
            seen = seen & (real != 0)
        scores = tl.where(seen, tl.sum(k * q[None, :], axis=1), float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=0))
        p = exp2(scores - new_largest, k_ptr.dtype.element_ty)
        shrink = exp2(largest - new_largest, k_ptr.dtype.element_ty)
        total = total * shrink + tl.sum(p, axis=0)
        acc = acc * shrink + tl.sum(p[:, None] * v, axis=0)
        largest = new_largest
    row = tl.program_id(1).to(tl.int64) * plane + tl.program_id(0)
    columns = tl.arange(0, BLOCK_D)
    # A part with no valid key writes zeros and -infinity, which weigh nothing.
    out = tl.where(total > 0.0, acc * tl.div_rn(1.0, total), 0.0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * D + columns, out, mask=columns < D)
    if lse_ptr is not None:
        lse = log_sum_exp(largest, total, lse_ptr.dtype.element_ty)
        tl.store(lse_ptr + row + tl.zeros([1], tl.int32), lse)


def decode_attention_triton(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None,
    key_padding_mask: Tensor | None, scale: float, config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Returns (B, H, 1, D); no look at the lengths, so that a CUDA graph can capture it."""
    B, H, _, D = q.shape
    T = k_cache.shape[2]
    if not supported(q.dtype, D):
        return NotImplemented
    out = q.new_empty((B, H, 1, D))
    if out.numel() == 0 or T == 0:
        return out.zero_()
    q, k_cache, v_cache = readable(q), readable(k_cache), readable(v_cache)
    config = config or launch_config(
        "decode_attention", (D, q.dtype, size_class(B * H), length_class(T)), DEFAULTS, CANDIDATES,
        lambda c: decode_attention_triton(q, k_cache, v_cache, lengths, key_padding_mask, scale, c),
        q.get_device(),
    )  # fmt: skip
    parts, keys_per_part = 1, T
    if T > SPLIT_FROM:
        parts, keys_per_part = split_keys(T, config["BLOCK_N"], H, B * H, q.device)
    to, to_lse = (out, None) if parts == 1 else partial_outputs(out, parts)
    _decode_kernel[(B * H, parts)](
        q, k_cache, v_cache, contiguous(lengths), as_bytes(key_padding_mask),
        to, to_lse, *q.stride()[:2], *k_cache.stride()[:3],
        *v_cache.stride()[:3], H, T, scale, B * H, keys_per_part,
        D=D, BLOCK_D=power_of_2(D), PADDED=key_padding_mask is not None,
        GROUP=H // k_cache.shape[1], **config,
    )  # fmt: skip
    if parts > 1:
        combine(to, to_lse, out, None)
    return out


def cross_compile_cases(architecture: str) -> Iterator[Case]:
    """A decoding step of QLLaMA, with padding."""
    strides = ("q_batch_stride", "q_head_stride", "k_batch_stride", "k_head_stride", "k_stride",
               "v_batch_stride", "v_head_stride", "v_stride")  # fmt: skip
    arguments = {
        **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*bf16"), "lengths_ptr": "*i64",
        "key_padding_mask_ptr": "*u8", "out_ptr": "*fp32", "lse_ptr": "*fp32",
        **dict.fromkeys(strides, "i32:16"), **dict.fromkeys(("H", "T", "plane"), "i32"),
        "scale": "fp32", "keys_per_part": "i32", "D": 128, "BLOCK_D": 128, "PADDED": True,
        "GROUP": 1,
    }  # fmt: skip
    config = DEFAULTS[architecture]
    fp32: tuple[Config, dict[str, object]] = config, {"lse_ptr": "*fp64"}
    name = "padded D=128 bf16"
    yield Case("decode_attention", name, _decode_kernel, arguments, config, fp32=fp32)
