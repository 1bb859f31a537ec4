"""attention in Triton, forward and backward. What it computes: kernels/attention.py.

The kernels also serve cross_attention: the rows of all r query batches that share the keys of one
image stand one below the other, row m being position m % S of batch image_step * image +
repeat_step * (m // S). K and V are read once for all of them, and their gradients are summed in
the walk over the rows. For plain attention r is 1.

Every mask but `visible` gives a row one interval of keys, so a tile visits the blocks between the
first and the last key that any of its rows sees. A row that sees nothing shows after the walk as a
sum of 0; only a tile with such a row then averages all values. Its log-sum-exp is -infinity, which
tells the backward pass. Outputs and gradients are (B, S, H, D) in memory, as projections need them.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvl_engine.reference import MASKS

from ._attention_backward import keys_kernel, queries_kernel
from ._attention_core import (
    COUNTS,
    LOG2E,
    LOWEST,
    length_class,
    load_at,
    load_tile,
    log_sum_exp,
    lse_dtype,
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
from ._tuning import ARCHITECTURES, Config, launch_config


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
    q_ptr, k_ptr, v_ptr, visible_ptr, out_ptr, lse_ptr, batch, repeat_step, head, first_row,
    q_batch_stride, q_stride, k_stride, v_stride, first_key, end_key, H, S, M, T, prefix, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, VISIBLE: tl.constexpr,
):  # fmt: skip
    """BLOCK_M packed rows of one head against the keys of [first_key, end_key) that they see."""
    rows = first_row + tl.arange(0, BLOCK_M)
    valid = rows < M
    batches = batch + rows // S * repeat_step  # int64
    q = load_at(q_ptr, batches * q_batch_stride + rows % S * q_stride, valid, D, BLOCK_D)
    first, end = seen_interval(T - S + rows % S, prefix, T, MASK)
    low = tl.maximum(first_key, tl.min(tl.where(valid, first, T), axis=0))
    high = tl.minimum(end_key, tl.max(tl.where(valid, end, 0), axis=0))
    largest = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = tl.minimum(end, end_key)
    for start in range(low, high, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, keys, k_stride, T, D, BLOCK_D, MASKED=True)
        scores = see(product(q, k.T), keys, first, end, visible_ptr, T, VISIBLE)
        v = load_tile(v_ptr, keys, v_stride, T, D, BLOCK_D, MASKED=True)
        largest, total, acc = softmax_block(scores, scale, v, largest, total, acc)
    if VISIBLE:
        empty = valid & (total == 0.0)
        if tl.max(empty.to(tl.int32), axis=0) > 0:
            acc += _average_all(v_ptr, v_stride, T, empty, D, BLOCK_D, BLOCK_M, BLOCK_N)
            total = tl.where(empty, T.to(tl.float32), total)
            largest = tl.where(empty, float("-inf"), largest)
    out_rows = (batches * S + rows % S) * H + head
    store_at(out_ptr, out_rows * D, valid, acc * tl.div_rn(1.0, total)[:, None], D, BLOCK_D)
    if lse_ptr is not None:
        lse = log_sum_exp(largest, total, lse_ptr.dtype.element_ty)
        tl.store(lse_ptr + (batches * H + head) * S + rows % S, lse, mask=valid)


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, visible_ptr, out_ptr, lse_ptr,
    q_batch_stride, q_head_stride, q_stride, k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride, image_step, repeat_step,
    H, S, M, T, prefix, scale, plane, tiles, keys_per_split,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MASK: tl.constexpr, VISIBLE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M or TAIL_M packed rows of one head against one part of the keys.

    program_id(1) is the part; each writes its own plane of out and lse, to be combined.
    """
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles % H).to(tl.int64)
    image = (tl.program_id(0) // tiles // H).to(tl.int64)
    q_ptr += head * q_head_stride
    k_ptr += image * k_batch_stride + head * k_head_stride
    v_ptr += image * v_batch_stride + head * v_head_stride
    if VISIBLE:
        visible_ptr += image * T
    first_key = tl.program_id(1) * keys_per_split
    end_key = tl.minimum(first_key + keys_per_split, T)
    if lse_ptr is not None:
        lse_ptr += tl.program_id(1).to(tl.int64) * plane
    out_ptr += tl.program_id(1).to(tl.int64) * plane * D
    if TAIL_M == 0 or tile < tiles - 1:
        _forward_tile(
            q_ptr, k_ptr, v_ptr, visible_ptr, out_ptr, lse_ptr, image * image_step, repeat_step,
            head, tile * BLOCK_M, q_batch_stride, q_stride, k_stride, v_stride, first_key, end_key,
            H, S, M, T, prefix, scale * LOG2E, D, BLOCK_D, BLOCK_M, BLOCK_N, MASK, VISIBLE,
        )  # fmt: skip
    else:
        _forward_tile(
            q_ptr, k_ptr, v_ptr, visible_ptr, out_ptr, lse_ptr, image * image_step, repeat_step,
            head, tile * BLOCK_M, q_batch_stride, q_stride, k_stride, v_stride, first_key, end_key,
            H, S, M, T, prefix, scale * LOG2E, D, BLOCK_D, TAIL_M, BLOCK_N, MASK, VISIBLE,
        )  # fmt: skip


def _config(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Config:
    return {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages,
    }  # fmt: skip


# By width class, then architecture. Chosen by what Triton 3.4, 3.6 and 3.9 compile without spills;
# not yet timed on a GPU.
FORWARD = {
    "wide": {
        "sm80": _config(64, 64, 8, 2), "sm90": _config(128, 64, 8, 2),
        "sm100": _config(128, 64, 8, 2), "gfx942": _config(64, 32, 4, 1),
    },
    "narrow": {
        "sm80": _config(64, 32, 4, 2), "sm90": _config(64, 64, 4, 2),
        "sm100": _config(64, 64, 4, 2), "gfx942": _config(64, 32, 4, 1),
    },
    "fp32": dict.fromkeys(ARCHITECTURES, _config(32, 16, 8, 2)),
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
        "sm80": _config(64, 64, 8, 2), "sm90": _config(64, 64, 8, 2),
        "sm100": _config(64, 64, 8, 2), "gfx942": _config(64, 64, 4, 1),
    },
    "fp32": dict.fromkeys(ARCHITECTURES, _config(16, 16, 8, 1)),
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


def as_bytes(visible: Tensor | None) -> Tensor | None:
    """The mask (B, T), contiguous, in a type that kernels load."""
    return None if visible is None else visible.contiguous().view(torch.uint8)


def row_tiles(config: Config, own: str, rows: int) -> tuple[int, dict[str, int]]:
    """(tiles a head, the constant for the last one) of `rows` rows in tiles of config[own]."""
    return cdiv(rows, config[own]), {f"TAIL_{own[-1]}": tail(rows, config[own])}


def head_constants(D: int, mask: str, visible: Tensor | None) -> dict[str, int | bool]:
    """What all three kernels are specialised for."""
    width = max(16, power_of_2(D))
    case = MASKS.index(mask)
    return {"D": D, "BLOCK_D": width, "MASK": case, "VISIBLE": visible is not None}


def attention_triton(
    q: Tensor, k: Tensor, v: Tensor, mask: str, prefix: int, visible: Tensor | None, scale: float,
    saves: bool, config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns (out (B, H, S, D), lse (B, H, S) or nothing); takes CPU tensors interpreted."""
    B, H, S, D = q.shape
    T = k.shape[2]
    if not supported(q.dtype, D):
        return NotImplemented
    out = q.new_empty((B, S, H, D)).transpose(1, 2)
    lse = q.new_empty((B, H, S) if saves else 0, dtype=lse_dtype(q.dtype))
    if out.numel() == 0 or T == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    q, k, v = readable(q), readable(k), readable(v)
    config = config or launch_config(
        "attention", (width_class(D, q.dtype), mask, length_class(T)),
        FORWARD[width_class(D, q.dtype)], CANDIDATES,
        lambda c: attention_triton(q, k, v, mask, prefix, visible, scale, saves, c), q.get_device(),
    )  # fmt: skip
    tiles, rest = row_tiles(config, "BLOCK_M", S)
    visible = as_bytes(visible)
    forward_kernel[(tiles * H * B, 1)](
        q, k, v, visible, out, lse if saves else None,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], 1, 0,
        H, S, S, T, prefix, scale, 0, tiles, T,
        **head_constants(D, mask, visible), **rest, **config,
    )  # fmt: skip
    return out, lse


def attention_backward_triton(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: str, prefix: int,
    visible: Tensor | None, scale: float, configs: tuple[Config, Config] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns (dq, dk, dv), each with (B, S, H, D) in memory."""
    if not supported(q.dtype, q.shape[-1]):
        return NotImplemented
    return packed_backward(
        grad, q, k, v, out, lse, mask, prefix, visible, scale, 1, 0, "attention", configs
    )


def packed_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: str, prefix: int,
    visible: Tensor | None, scale: float, image_step: int, repeat_step: int, operator: str,
    configs: tuple[Config, Config] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of `operator`; image_step and repeat_step as the head of the file says."""
    B, H, T, D = k.shape
    S = q.shape[2]
    dq, dk, dv = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))
    if grad.numel() == 0 or T == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    M = q.shape[0] // B * S
    grad, out = grad.transpose(1, 2).contiguous(), out.transpose(1, 2).contiguous()
    q, k, v = readable(q), readable(k), readable(v)
    delta = lse.new_empty(lse.shape, dtype=torch.float32)
    visible = as_bytes(visible)
    sizes = (
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], image_step, repeat_step,
        H, S, M, T, prefix, scale,
    )  # fmt: skip
    constants = head_constants(D, mask, visible)

    def queries(config: Config) -> None:
        tiles, rest = row_tiles(config, "BLOCK_M", M)
        queries_kernel[(tiles * H * B,)](
            q, k, v, visible, out, grad, lse, delta, dq, *sizes, tiles,
            **constants, **rest, **config,
        )  # fmt: skip

    def keys(config: Config) -> None:
        tiles, rest = row_tiles(config, "BLOCK_N", T)
        keys_kernel[(tiles * H * B,)](
            q, k, v, visible, grad, lse, delta, dk, dv, *sizes, tiles, **constants, **rest, **config
        )

    kind, device = width_class(D, q.dtype), q.get_device()
    key = (kind, mask, length_class(T))
    for run, name, defaults, chosen in (
        (queries, "queries", QUERIES, configs and configs[0]),
        (keys, "keys", KEYS, configs and configs[1]),
    ):
        run(chosen or launch_config(
            f"{operator}_{name}", key, defaults[kind], CANDIDATES, run, device
        ))  # fmt: skip
    return dq, dk, dv


def compile_values(D: int, mask: str, visible: bool) -> dict[str, object]:
    """The arguments of all three kernels for cross-compiling, bf16."""
    pointers = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "d_out_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
    strides = [f"{x}{s}stride" for x in "qkv" for s in ("_batch_", "_head_", "_")]
    return {
        **dict.fromkeys(pointers, "*bf16"), **dict.fromkeys(strides, "i32:16"),
        **dict.fromkeys(COUNTS, "i32"), "scale": "fp32", "lse_ptr": "*fp32", "delta_ptr": "*fp32",
        "visible_ptr": "*u8" if visible else None, "MASK": MASKS.index(mask), "VISIBLE": visible,
        "D": D, "BLOCK_D": max(16, power_of_2(D)),
    }  # fmt: skip


def compile_case(
    operator: str, name: str, kernel, config: Config, values: dict[str, object]
) -> Case:
    """One kernel with the arguments that it has among `values`."""
    kept = {n: values[n] for n in kernel.arg_names if n in values and n not in config}
    return Case(operator, name, kernel, kept, config, matrix=True)


def cross_compile_cases(architecture: str) -> Iterator[Case]:
    """QLLaMA's masks with padding, 96 queries and 80 text positions, and the nano model's heads."""
    for D, mask, visible in ((128, "full", False), (128, "prefix", True), (16, "causal", True)):
        for name, kernel, table, own in (
            ("forward", forward_kernel, FORWARD, "BLOCK_M"),
            ("dq", queries_kernel, QUERIES, "BLOCK_M"),
            ("dk and dv", keys_kernel, KEYS, "BLOCK_N"),
        ):
            config = table["wide" if D == 128 else "narrow"][architecture]
            values = compile_values(D, mask, visible) | row_tiles(config, own, 96 + 80)[1]
            label = f"{name} {mask}{' padded' if visible else ''} D={D} bf16"
            yield compile_case("attention", label, kernel, config, values)
