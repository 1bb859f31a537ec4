"""attention in Triton, forward and backward. What it computes: kernels/attention.py.

All query rows that read one key head of one image stand one below the other: those of the r batches
that share the image's keys, of the heads that share the key head, and of every position
(`packed_rows`). K and V are read once for all of them, and their gradients are summed in the walk
over the rows. Where that gives few programs (batch 1: 32 heads of 96 queries) and no key is hidden,
the keys are split and a second kernel combines.

Every mask but `key_padding_mask` gives a row one interval of keys, so a tile visits the blocks
between the first and the last key that any of its rows sees. A row that sees nothing shows after
the walk as a sum of 0; only a tile with such a row then averages all values. Its log-sum-exp is
-infinity, which tells the backward pass. Outputs and gradients are (B, S, H, D) in memory, as
projections need them.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvl_engine.reference import MASKS

from .._heads import lse_dtype
from ._attention_backward import keys_kernel, queries_kernel
from ._attention_combine import (
    combine,
    combine_config,
    combine_kernel,
    partial_outputs,
    split_keys,
)
from ._attention_core import (
    COUNTS,
    LOG2E,
    LOWEST,
    length_class,
    load_at,
    load_tile,
    log_sum_exp,
    packed_rows,
    product,
    softmax_block,
    store_at,
    supported,
    tail,
    width_class,
)
from ._attention_masks import see, seen_interval
from ._cross_compile import Case
from ._sizes import cdiv, power_of_2
from ._tuning import ARCHITECTURES, Config, launch_config, size_class


@triton.jit
def _average_all(v_ptr, v_stride, T, empty, D: tl.constexpr, BLOCK_D: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """The sum of all values for the rows where empty, 0 for the others: (BLOCK_M, BLOCK_D)."""
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    ones = tl.where(empty, 1.0, 0.0)[:, None] + tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, T, BLOCK_N):
        v = load_tile(v_ptr, start + tl.arange(0, BLOCK_N), v_stride, T, D, BLOCK_D, MASKED=True)
        acc = tl.dot(ones.to(v.dtype), v, acc, input_precision="ieee")
    return acc


@triton.jit
def _forward_tile(
    q_ptr, k_ptr, v_ptr, key_padding_mask_ptr, out_ptr, lse_ptr, image, image_step, repeat_step,
    key_head, first_row, q_batch_stride, q_head_stride, q_stride, k_stride, v_stride, first_key,
    end_key, H, S, M, T, prefix, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """BLOCK_M packed rows of a key head against the keys of [first_key, end_key) they see."""
    rows = first_row + tl.arange(0, BLOCK_M)
    valid = rows < M
    batches, head, positions = packed_rows(rows, image, image_step, repeat_step, key_head, S, GROUP)
    q_rows = batches * q_batch_stride + head * q_head_stride + positions * q_stride  # int64
    q = load_at(q_ptr, q_rows, valid, D, BLOCK_D)
    first, end = seen_interval(T - S + positions, prefix, T, MASK)
    low = tl.maximum(first_key, tl.min(tl.where(valid, first, T), axis=0))
    high = tl.minimum(end_key, tl.max(tl.where(valid, end, 0), axis=0))
    largest = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = tl.minimum(end, end_key)
    for start in range(low, high, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, keys, k_stride, T, D, BLOCK_D, MASKED=True)
        scores = see(product(q, k.T), keys, first, end, key_padding_mask_ptr, T, PADDED)
        v = load_tile(v_ptr, keys, v_stride, T, D, BLOCK_D, MASKED=True)
        largest, total, acc = softmax_block(scores, scale, v, largest, total, acc)
    if PADDED:
        empty = valid & (total == 0.0)
        if tl.max(empty.to(tl.int32), axis=0) > 0:
            acc += _average_all(v_ptr, v_stride, T, empty, D, BLOCK_D, BLOCK_M, BLOCK_N)
            total = tl.where(empty, T.to(tl.float32), total)
            largest = tl.where(empty, float("-inf"), largest)
    out_rows = (batches * S + positions) * H + head
    store_at(out_ptr, out_rows * D, valid, acc * tl.div_rn(1.0, total)[:, None], D, BLOCK_D)
    if lse_ptr is not None:
        lse = log_sum_exp(largest, total, lse_ptr.dtype.element_ty)
        tl.store(lse_ptr + (batches * H + head) * S + positions, lse, mask=valid)


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, key_padding_mask_ptr, out_ptr, lse_ptr,
    q_batch_stride, q_head_stride, q_stride, k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride, image_step, repeat_step,
    H, S, M, T, prefix, scale, plane, tiles, keys_per_split,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MASK: tl.constexpr, PADDED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M or TAIL_M packed rows of one key head against one part of the keys.

    program_id(1) is the part; each writes its own plane of out and lse, to be combined.
    """
    tile = tl.program_id(0) % tiles
    key_head = (tl.program_id(0) // tiles % (H // GROUP)).to(tl.int64)
    image = (tl.program_id(0) // tiles // (H // GROUP)).to(tl.int64)
    k_ptr += image * k_batch_stride + key_head * k_head_stride
    v_ptr += image * v_batch_stride + key_head * v_head_stride
    if PADDED:
        key_padding_mask_ptr += image * T
    first_key = tl.program_id(1) * keys_per_split
    end_key = tl.minimum(first_key + keys_per_split, T)
    if lse_ptr is not None:
        lse_ptr += tl.program_id(1).to(tl.int64) * plane
    out_ptr += tl.program_id(1).to(tl.int64) * plane * D
    if TAIL_M == 0 or tile < tiles - 1:
        _forward_tile(
            q_ptr, k_ptr, v_ptr, key_padding_mask_ptr, out_ptr, lse_ptr, image, image_step,
            repeat_step, key_head, tile * BLOCK_M, q_batch_stride, q_head_stride, q_stride,
            k_stride, v_stride, first_key, end_key, H, S, M, T, prefix, scale * LOG2E,
            D, BLOCK_D, BLOCK_M, BLOCK_N, MASK, PADDED, GROUP,
        )  # fmt: skip
    else:
        _forward_tile(
            q_ptr, k_ptr, v_ptr, key_padding_mask_ptr, out_ptr, lse_ptr, image, image_step,
            repeat_step, key_head, tile * BLOCK_M, q_batch_stride, q_head_stride, q_stride,
            k_stride, v_stride, first_key, end_key, H, S, M, T, prefix, scale * LOG2E,
            D, BLOCK_D, TAIL_M, BLOCK_N, MASK, PADDED, GROUP,
        )  # fmt: skip


def _config(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Config:
    return {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages,
    }  # fmt: skip


# By width class, then architecture. Chosen by what Triton 3.4, 3.6 and 3.9 compile without spills;
# not yet timed on a GPU.
FORWARD = {
    "wide": {
        # Two programs a multiprocessor, without a spill for heads that share keys either.
        "sm80": _config(64, 64, 8, 2), "sm90": _config(64, 32, 4, 3),
        "sm100": _config(128, 64, 8, 2), "gfx942": _config(64, 32, 4, 1),
    },
    "narrow": {
        "sm80": _config(64, 32, 4, 2), "sm90": _config(64, 64, 4, 2),
        "sm100": _config(64, 64, 4, 2), "gfx942": _config(64, 32, 4, 1),
    },
    "fp32": dict.fromkeys(ARCHITECTURES, _config(16, 16, 4, 2)),
}  # fmt: skip
QUERIES = {
    "wide": {
        "sm80": _config(64, 32, 8, 2), "sm90": _config(64, 64, 8, 2),
        "sm100": _config(64, 64, 8, 2), "gfx942": _config(64, 32, 8, 1),
    },
    "narrow": {
        "sm80": _config(64, 64, 8, 2), "sm90": _config(64, 64, 4, 2),
        "sm100": _config(64, 64, 4, 2), "gfx942": _config(32, 32, 4, 1),
    },
    "fp32": dict.fromkeys(ARCHITECTURES, _config(16, 16, 8, 1)),
}  # fmt: skip
KEYS = {
    "wide": {
        "sm80": _config(32, 64, 8, 2), "sm90": _config(32, 64, 8, 2),
        "sm100": _config(32, 64, 8, 2), "gfx942": _config(32, 64, 4, 1),
    },
    "narrow": {
        "sm80": _config(32, 64, 8, 2), "sm90": _config(64, 64, 8, 2),
        "sm100": _config(64, 64, 8, 2), "gfx942": _config(64, 64, 4, 1),
    },
    "fp32": dict.fromkeys(ARCHITECTURES, _config(16, 32, 8, 1)),
}  # fmt: skip
CANDIDATES = [
    _config(block_m, block_n, num_warps, num_stages)
    for block_m, block_n in ((128, 64), (128, 32), (64, 128), (64, 64), (64, 32), (32, 64))
    for num_warps in (4, 8)
    for num_stages in (1, 2, 3)
]


def readable(x: Tensor) -> Tensor:
    """x (B, H, S, D), or a copy where D is not contiguous or positions span 2**31 elements.

    Kernels add up 64-bit offsets of batch and head, and 32-bit ones of the positions.
    """
    _, _, position, last = x.stride()
    return x if last == 1 and position * x.shape[2] < 2**31 else x.contiguous()


def as_bytes(key_padding_mask: Tensor | None) -> Tensor | None:
    """The mask (B, T), contiguous, in a type that kernels load."""
    return None if key_padding_mask is None else key_padding_mask.contiguous().view(torch.uint8)


def row_tiles(config: Config, own: str, rows: int) -> tuple[int, dict[str, int]]:
    """(tiles a head, the constant for the last one) of `rows` rows in tiles of config[own]."""
    return cdiv(rows, config[own]), {f"TAIL_{own[-1]}": tail(rows, config[own])}


def head_constants(q: Tensor, k: Tensor, mask: str, padded: bool) -> dict[str, int | bool]:
    """What all three kernels are specialised for."""
    D = q.shape[-1]
    return {
        "D": D, "BLOCK_D": max(16, power_of_2(D)), "MASK": MASKS.index(mask), "PADDED": padded,
        "GROUP": q.shape[1] // k.shape[1],
    }  # fmt: skip


def sizes(
    q: Tensor, k: Tensor, v: Tensor, prefix: int, scale: float, interleave: bool
) -> tuple[int | float, ...]:
    """The arguments of all three kernels from q's strides to scale."""
    (batch, H, S, _), (B, key_heads, T, _) = q.shape, k.shape
    steps = (batch // B, 1) if interleave else (1, B)  # to the next image, to the next repeat
    M = batch // B * (H // key_heads) * S
    return (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *steps, H, S, M, T, prefix, scale)


def attention_triton(
    q: Tensor, k: Tensor, v: Tensor, mask: str, prefix: int, key_padding_mask: Tensor | None,
    scale: float, interleave: bool, saves: bool, config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns (out (r * B, H, S, D), lse (r * B, H, S) or nothing)."""
    (batch, H, S, D), (B, key_heads, T, _) = q.shape, k.shape
    if not supported(q.dtype, D):
        return NotImplemented
    out = q.new_empty((batch, S, H, D)).transpose(1, 2)
    lse = q.new_empty((batch, H, S) if saves else 0, dtype=lse_dtype(q.dtype))
    if out.numel() == 0 or T == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    q, k, v = readable(q), readable(k), readable(v)
    config = config or launch_config(
        "attention", (width_class(D, q.dtype), mask, length_class(T), size_class(batch * H)),
        FORWARD[width_class(D, q.dtype)], CANDIDATES,
        lambda c: attention_triton(
            q, k, v, mask, prefix, key_padding_mask, scale, interleave, saves, c
        ),
        q.get_device(),
    )  # fmt: skip
    tiles, rest = row_tiles(config, "BLOCK_M", batch // B * (H // key_heads) * S)
    padded = key_padding_mask is not None
    parts, keys_per_part = 1, T
    if mask == "full" and not padded:  # every part of the keys has some for every row
        programs = tiles * key_heads * B
        parts, keys_per_part = split_keys(T, config["BLOCK_N"], key_heads, programs, q.device)
    saved = lse if saves else None
    to, to_lse = (out, saved) if parts == 1 else partial_outputs(out, parts)
    forward_kernel[(tiles * key_heads * B, parts)](
        q, k, v, as_bytes(key_padding_mask), to, to_lse,
        *sizes(q, k, v, prefix, scale, interleave), batch * H * S, tiles, keys_per_part,
        **head_constants(q, k, mask, padded), **rest, **config,
    )  # fmt: skip
    if parts > 1:
        combine(to, to_lse, out, saved)
    return out, lse


def attention_backward_triton(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: str, prefix: int,
    key_padding_mask: Tensor | None, scale: float, interleave: bool,
    configs: tuple[Config, Config] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns (dq, dk, dv), each with (B, S, H, D) in memory; dk and dv summed over what shares."""
    if not supported(q.dtype, q.shape[-1]):
        return NotImplemented
    B, key_heads, T, D = k.shape
    dq, dk, dv = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))
    if grad.numel() == 0 or T == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    M = q.numel() // (B * key_heads * D)
    grad, out = grad.transpose(1, 2).contiguous(), out.transpose(1, 2).contiguous()
    q, k, v = readable(q), readable(k), readable(v)
    delta = lse.new_empty(lse.shape, dtype=torch.float32)
    padding = as_bytes(key_padding_mask)
    shared = sizes(q, k, v, prefix, scale, interleave)
    constants = head_constants(q, k, mask, padding is not None)

    def queries(config: Config) -> None:
        tiles, rest = row_tiles(config, "BLOCK_M", M)
        queries_kernel[(tiles * key_heads * B,)](
            q, k, v, padding, out, grad, lse, delta, dq, *shared, tiles,
            **constants, **rest, **config,
        )  # fmt: skip

    def keys(config: Config) -> None:
        tiles, rest = row_tiles(config, "BLOCK_N", T)
        keys_kernel[(tiles * key_heads * B,)](
            q, k, v, padding, grad, lse, delta, dk, dv, *shared, tiles,
            **constants, **rest, **config,
        )  # fmt: skip

    kind, device = width_class(D, q.dtype), q.get_device()
    key = (kind, mask, length_class(T), size_class(q.shape[0] * q.shape[1]))
    for run, name, defaults, chosen in (
        (queries, "queries", QUERIES, configs and configs[0]),
        (keys, "keys", KEYS, configs and configs[1]),
    ):
        run(chosen or launch_config(
            f"attention_{name}", key, defaults[kind], CANDIDATES, run, device
        ))  # fmt: skip
    return dq, dk, dv


def _compile_values(D: int, mask: str, padded: bool, group: int) -> dict[str, object]:
    """The arguments of all three kernels for cross-compiling, bf16."""
    pointers = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "d_out_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
    strides = [f"{x}{s}stride" for x in "qkv" for s in ("_batch_", "_head_", "_")]
    return {
        **dict.fromkeys(pointers, "*bf16"), **dict.fromkeys(strides, "i32:16"),
        **dict.fromkeys(COUNTS, "i32"), "scale": "fp32", "lse_ptr": "*fp32", "delta_ptr": "*fp32",
        "key_padding_mask_ptr": "*u8" if padded else None, "MASK": MASKS.index(mask),
        "PADDED": padded, "GROUP": group, "D": D, "BLOCK_D": max(16, power_of_2(D)),
    }  # fmt: skip


def _compile_case(
    name: str, kernel, architecture: str, width: str, table: dict[str, dict[str, Config]], own: str,
    rows: int, values: dict[str, object],
) -> Case:  # fmt: skip
    """One kernel with the arguments that it has among `values`, on tiles of `rows` rows."""

    config, wide = table[width][architecture], table["fp32"][architecture]
    values = values | row_tiles(config, own, rows)[1]
    kept = {n: values[n] for n in kernel.arg_names if n in values and n not in config}
    fp32 = wide, {"lse_ptr": "*fp64", **row_tiles(wide, own, rows)[1]}
    return Case("attention", name, kernel, kept, config, matrix=True, fp32=fp32)


def cross_compile_cases(architecture: str) -> Iterator[Case]:
    """QLLaMA's masks with padding, 96 queries and 80 text positions, the nano model's heads, and
    heads that share keys; then 96 queries to the vision tokens, split over the keys."""
    for D, mask, padded, group in (
        (128, "full", False, 1), (128, "prefix", True, 1), (16, "causal", True, 1),
        (128, "causal", False, 8),
    ):  # fmt: skip
        for name, kernel, table, own in (
            ("forward", forward_kernel, FORWARD, "BLOCK_M"),
            ("dq", queries_kernel, QUERIES, "BLOCK_M"),
            ("dk and dv", keys_kernel, KEYS, "BLOCK_N"),
        ):
            width = "wide" if D == 128 else "narrow"
            values = _compile_values(D, mask, padded, group)
            of_group = f" group={group}" if group > 1 else ""
            label = f"{name} {mask}{' padded' if padded else ''} D={D}{of_group} bf16"
            yield _compile_case(label, kernel, architecture, width, table, own, 96 + 80, values)
    split = _compile_values(128, "full", False, 1) | {"out_ptr": "*fp32"}
    label = "forward split S=96 D=128 bf16"
    yield _compile_case(label, forward_kernel, architecture, "wide", FORWARD, "BLOCK_M", 96, split)
    arguments = {
        "partial_ptr": "*fp32", "partial_lse_ptr": "*fp32", "out_ptr": "*bf16", "lse_ptr": None,
        "rows": "i32", "S": "i32", "H": "i32", "parts": "i32",
    }  # fmt: skip
    for parts in (8, 64):
        shape = {"D": 128, "BLOCK_D": 128, "BLOCK_P": parts}
        name, config = f"combine {parts} parts D=128 bf16", combine_config(shape)
        fp32: tuple[Config, dict[str, object]] = config, {"partial_lse_ptr": "*fp64"}
        yield Case("attention", name, combine_kernel, {**arguments, **shape}, config, fp32=fp32)
