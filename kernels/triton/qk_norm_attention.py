"""qk_norm_attention in Triton. What it computes and why: kernels/qk_norm_attention.py."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._heads import lse_dtype
from ._attention_core import (
    LOG2E,
    LOWEST,
    contiguous,
    length_class,
    load_row,
    load_tile,
    log_sum_exp,
    product,
    softmax_block,
    store_at,
    supported,
    tail,
    width_class,
)
from ._cross_compile import Case
from ._qk_norm_attention_backward import keys_kernel, norm_kernel, queries_kernel
from ._sizes import cache_bytes, cdiv, power_of_2
from ._tuning import ARCHITECTURES, OPTIONS, Config, launch_config, size_class


def _config(block_m: int, block_n: int, num_warps: int, num_stages: int) -> Config:
    return {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages,
    }  # fmt: skip


# By width class, then architecture. Chosen by what Triton 3.4, 3.6 and 3.9 compile without spills;
# not yet timed on a GPU.
FORWARD = {
    "wide": {
        # Two programs a multiprocessor. (128, 64) in 8 warps is one, at 204 registers; (128, 32)
        # in 4 warps spills with Triton 3.9.
        "sm80": _config(128, 32, 8, 3), "sm90": _config(64, 64, 4, 2),
        "sm100": _config(128, 64, 8, 3), "gfx942": _config(128, 32, 4, 2),
    },
    "narrow": {
        "sm80": _config(128, 64, 8, 3), "sm90": _config(128, 64, 8, 3),
        "sm100": _config(128, 64, 8, 3), "gfx942": _config(128, 64, 4, 1),
    },
    "fp32": dict.fromkeys(ARCHITECTURES, _config(32, 16, 8, 2)),
}  # fmt: skip
QUERIES = {
    "wide": {
        "sm80": _config(64, 64, 8, 2), "sm90": _config(128, 64, 8, 2),
        "sm100": _config(64, 128, 8, 2), "gfx942": _config(64, 32, 4, 1),
    },
    "narrow": {
        "sm80": _config(64, 64, 4, 2), "sm90": _config(128, 64, 8, 2),
        "sm100": _config(128, 64, 8, 2), "gfx942": _config(64, 64, 4, 1),
    },
    "fp32": dict.fromkeys(ARCHITECTURES, _config(16, 16, 8, 1)),
}  # fmt: skip
KEYS = {
    "wide": {
        "sm80": _config(32, 64, 8, 2), "sm90": _config(32, 64, 8, 2),
        "sm100": _config(64, 128, 8, 2), "gfx942": _config(32, 64, 4, 1),
    },
    "narrow": {
        "sm80": _config(64, 32, 8, 2), "sm90": _config(64, 128, 8, 2),
        "sm100": _config(64, 128, 8, 2), "gfx942": _config(64, 64, 4, 1),
    },
    "fp32": dict.fromkeys(ARCHITECTURES, _config(16, 16, 8, 1)),
}  # fmt: skip
CANDIDATES = [
    _config(block_m, block_n, num_warps, num_stages)
    for block_m, block_n in ((128, 128), (128, 64), (128, 32), (64, 128), (64, 64), (64, 32))
    for num_warps in (4, 8)
    for num_stages in (1, 2, 3)
]


@triton.jit(do_not_specialize=["first_image", "B", "N"])
def statistics_kernel(
    qkv_ptr, rstd_ptr, batch_stride, token_stride, part_stride, first_image, B, N, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program reads q and k of one token and writes 1 / rms of each, over all heads."""
    token = tl.cast(first_image, tl.int64) * N + tl.program_id(0)
    row_ptr = qkv_ptr + token // N * batch_stride + token % N * token_stride
    q_squares = tl.zeros([BLOCK_C], tl.float32)
    k_squares = tl.zeros([BLOCK_C], tl.float32)
    for start in tl.static_range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        q = tl.load(row_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
        k = tl.load(row_ptr + part_stride + cols, mask=cols < C, other=0.0).to(tl.float32)
        q_squares += q * q
        k_squares += k * k
    tl.store(rstd_ptr + token, tl.rsqrt(tl.div_rn(tl.sum(q_squares, axis=0), C) + eps))
    tl.store(rstd_ptr + B * N + token, tl.rsqrt(tl.div_rn(tl.sum(k_squares, axis=0), C) + eps))


@triton.jit
def _key_block(
    q, k_ptr, v_ptr, k_rstd_ptr, start, N, token_stride, scale, largest, total, acc,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    NORM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Takes the keys [start, start + BLOCK_N) into the softmax; MASKED where N ends inside."""
    keys = start + tl.arange(0, BLOCK_N)
    k = load_tile(k_ptr, keys, token_stride, N, D, BLOCK_D, MASKED)
    scores = product(q, k.T)
    if NORM:
        if MASKED:
            scores *= tl.load(k_rstd_ptr + keys, mask=keys < N, other=0.0)[None, :]
        else:
            scores *= tl.load(k_rstd_ptr + keys)[None, :]
    if MASKED:
        scores = tl.where((keys < N)[None, :], scores, float("-inf"))
    v = load_tile(v_ptr, keys, token_stride, N, D, BLOCK_D, MASKED)
    return softmax_block(scores, scale, v, largest, total, acc)


@triton.jit
def _forward_tile(
    q_ptr, k_ptr, v_ptr, fold, q_rstd_ptr, k_rstd_ptr, out_ptr, lse_ptr,
    first_row, N, token_stride, out_stride, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NORM: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """The query rows [first_row, first_row + BLOCK_M) of one head."""
    rows = first_row + tl.arange(0, BLOCK_M)
    q = load_tile(q_ptr, rows, token_stride, N, D, BLOCK_D, MASKED=True)
    if NORM:
        q_rstd = tl.load(q_rstd_ptr + rows, mask=rows < N, other=0.0)
        q = (q.to(tl.float32) * q_rstd[:, None] * fold[None, :]).to(q.dtype)
    if PEEL:  # the softmax starts from the last key, and only whole key blocks are left
        last_key = load_row(k_ptr + (N - 1) * token_stride, D, BLOCK_D)
        if NORM:
            last_key *= tl.load(k_rstd_ptr + N - 1)
        largest = tl.sum(q.to(tl.float32) * last_key[None, :], axis=1) * scale
        total = tl.full([BLOCK_M], 1.0, tl.float32)
        last_value = load_row(v_ptr + (N - 1) * token_stride, D, BLOCK_D)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32) + last_value[None, :]
    else:
        largest = tl.full([BLOCK_M], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    whole = N // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        largest, total, acc = _key_block(
            q, k_ptr, v_ptr, k_rstd_ptr, start, N, token_stride, scale, largest, total, acc,
            D, BLOCK_D, BLOCK_N, NORM, MASKED=False,
        )  # fmt: skip
    if not PEEL:  # at most once; as a loop it needs fewer registers than as an `if`
        for start in range(whole, N, BLOCK_N):
            largest, total, acc = _key_block(
                q, k_ptr, v_ptr, k_rstd_ptr, start, N, token_stride, scale, largest, total, acc,
                D, BLOCK_D, BLOCK_N, NORM, MASKED=True,
            )  # fmt: skip
    store_at(out_ptr, rows * out_stride, rows < N, acc * tl.div_rn(1.0, total)[:, None], D, BLOCK_D)
    if lse_ptr is not None:
        lse = log_sum_exp(largest, total, lse_ptr.dtype.element_ty)
        tl.store(lse_ptr + rows, lse, mask=rows < N)


@triton.jit(do_not_specialize=["first_image", "B", "N", "H", "tiles"])
def forward_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, rstd_ptr, out_ptr, lse_ptr,
    batch_stride, token_stride, part_stride, head_stride, first_image, B, N, H, scale, tiles,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr,
    BLOCK_N: tl.constexpr, NORM: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M query rows of one head, or the TAIL_M rows that are left over."""
    tile = tl.program_id(0) % tiles  # tiles of one head run side by side and share K, V in L2
    head = (tl.program_id(0) // tiles % H).to(tl.int64)
    batch = tl.cast(first_image, tl.int64) + tl.program_id(0) // tiles // H
    q_ptr = qkv_ptr + batch * batch_stride + head * head_stride
    k_ptr = q_ptr + part_stride
    v_ptr = k_ptr + part_stride
    out_ptr += (batch * N * H + head) * D
    if lse_ptr is not None:
        lse_ptr += (batch * H + head) * N
    scale *= LOG2E
    fold = tl.zeros([BLOCK_D], tl.float32)
    q_rstd_ptr = rstd_ptr + batch * N
    k_rstd_ptr = q_rstd_ptr + B * N
    if NORM:
        fold = load_row(q_weight_ptr + head * D, D, BLOCK_D)
        fold *= load_row(k_weight_ptr + head * D, D, BLOCK_D) * scale
        scale = 1.0
    if TAIL_M == 0 or tile < tiles - 1:
        _forward_tile(
            q_ptr, k_ptr, v_ptr, fold, q_rstd_ptr, k_rstd_ptr, out_ptr, lse_ptr,
            tile * BLOCK_M, N, token_stride, H * D, scale, D, BLOCK_D, BLOCK_M, BLOCK_N, NORM, PEEL,
        )  # fmt: skip
    else:
        _forward_tile(
            q_ptr, k_ptr, v_ptr, fold, q_rstd_ptr, k_rstd_ptr, out_ptr, lse_ptr,
            tile * BLOCK_M, N, token_stride, H * D, scale, D, BLOCK_D, TAIL_M, BLOCK_N, NORM, PEEL,
        )  # fmt: skip


def _heads_together(qkv: Tensor) -> Tensor:
    """qkv with the (H, D) of each part contiguous, as a projection writes it; else a copy."""
    dim = qkv.shape[-1]
    _, token, _, *head = qkv.stride()
    in_place = head == [dim, 1] and token * qkv.shape[1] < 2**31  # 32-bit offsets of tokens
    return qkv if in_place else qkv.contiguous()


def _statistics(qkv: Tensor, rstd: Tensor, eps: float, first_image: int, images: int) -> None:
    """Writes 1 / rms of q and of k of some images to rstd (2, B, N)."""
    B, N, _, H, D = qkv.shape
    block = min(power_of_2(H * D), 4096)
    statistics_kernel[(images * N,)](
        qkv, rstd, *qkv.stride()[:3], first_image, B, N, eps, H * D, block,
        num_warps=4 if block > 512 else 1, **OPTIONS,
    )  # fmt: skip


def _images_in_cache(qkv: Tensor, norm: bool) -> int:
    """How many images the statistics and then the attention read at a time.

    As many as stay in the L2 cache between the two, 8 on an H100 at 257 tokens of 25 x 128: at
    batch 64 reading q and k again from memory would be 210 MB.
    """
    B, N, _, H, D = qkv.shape
    image = 3 * N * H * D * qkv.element_size()
    return min(max(cache_bytes(qkv.device) * 4 // 5 // image, 1), B) if norm else B


def _tiles(config: Config, own: str, other: str, N: int) -> tuple[int, dict[str, int | bool]]:
    """(tiles a head, constants) for tiles of own rows that walk over blocks of other rows."""
    rest = tail(N, config[own])
    constants = {f"TAIL_{own[-1]}": rest, "PEEL": N % config[other] == 1}
    return cdiv(N, config[own]), constants


def qk_norm_attention_triton(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, scale: float,
    saves: bool, config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns (out (B, N, H, D), lse (B, H, N), rstd (2, B, N)), the last two if `saves`."""
    B, N, _, H, D = qkv.shape
    norm = q_weight is not None
    if not supported(qkv.dtype, D):
        return NotImplemented
    qkv, q_weight, k_weight = _heads_together(qkv), contiguous(q_weight), contiguous(k_weight)
    out = qkv.new_empty((B, N, H, D))
    lse = qkv.new_empty((B, H, N) if saves else 0, dtype=lse_dtype(qkv.dtype))
    rstd = qkv.new_empty((2, B, N) if norm else 0, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse, rstd if saves else rstd.new_empty(0)
    kind = width_class(D, qkv.dtype)
    config = config or launch_config(
        "qk_norm_attention", (kind, length_class(N), size_class(B * H)), FORWARD[kind], CANDIDATES,
        lambda c: qk_norm_attention_triton(qkv, q_weight, k_weight, eps, scale, saves, c),
        qkv.get_device(),
    )  # fmt: skip
    tiles, constants = _tiles(config, "BLOCK_M", "BLOCK_N", N)
    step = _images_in_cache(qkv, norm)
    for first_image in range(0, B, step):
        images = min(step, B - first_image)
        if norm:
            _statistics(qkv, rstd, eps, first_image, images)
        forward_kernel[(tiles * H * images,)](
            qkv, q_weight, k_weight, rstd, out, lse if saves else None,
            *qkv.stride()[:4], first_image, B, N, H, scale, tiles,
            D=D, BLOCK_D=max(16, power_of_2(D)), NORM=norm, **constants, **config,
        )  # fmt: skip
    return out, lse, rstd if saves else rstd.new_empty(0)


def qk_norm_attention_backward_triton(
    grad: Tensor, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    out: Tensor, lse: Tensor, rstd: Tensor, eps: float, scale: float,
    queries_config: Config | None = None, keys_config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns the gradients of qkv, contiguous, and of the weights, empty where those are None."""
    B, N, _, H, D = qkv.shape
    norm = q_weight is not None
    if not supported(qkv.dtype, D):
        return NotImplemented
    qkv, q_weight, k_weight = _heads_together(qkv), contiguous(q_weight), contiguous(k_weight)
    grad = grad.contiguous()
    d_qkv = qkv.new_empty(qkv.shape)
    delta = torch.empty_like(lse, dtype=torch.float32)
    folded = torch.empty_like(out) if norm else out
    if grad.numel() == 0:
        width = H * D if norm else 0
        return d_qkv, qkv.new_zeros(width), qkv.new_zeros(width)
    kind = width_class(D, qkv.dtype)
    key = (kind, length_class(N), size_class(B * H))
    shape = {"D": D, "BLOCK_D": max(16, power_of_2(D)), "NORM": norm}
    sizes = (*qkv.stride()[:4], B, N, H, scale)

    def queries(config: Config) -> None:
        tiles, constants = _tiles(config, "BLOCK_M", "BLOCK_N", N)
        queries_kernel[(tiles * H * B,)](
            qkv, q_weight, k_weight, rstd, out, grad, lse, delta, d_qkv, folded,
            *sizes, tiles, **shape, **constants, **config,
        )  # fmt: skip

    def keys(config: Config) -> None:
        tiles, constants = _tiles(config, "BLOCK_N", "BLOCK_M", N)
        keys_kernel[(tiles * H * B,)](
            qkv, folded, rstd, grad, lse, delta, d_qkv, *sizes, tiles,
            **shape, **constants, **config,
        )  # fmt: skip

    device = qkv.get_device()
    queries(queries_config or launch_config(
        "qk_norm_attention_queries", key, QUERIES[kind], CANDIDATES, queries, device
    ))  # fmt: skip
    keys(keys_config or launch_config(
        "qk_norm_attention_keys", key, KEYS[kind], CANDIDATES, keys, device
    ))  # fmt: skip
    if not norm:
        return d_qkv, qkv.new_empty(0), qkv.new_empty(0)
    block = power_of_2(H * D)
    d_weights = delta.new_empty((2, min(B * N, 256), H * D))  # a row a program, summed below
    norm_kernel[(d_weights.shape[1], 2)](
        qkv, q_weight, k_weight, rstd, d_qkv, d_weights, *qkv.stride()[:3], B, N, H * D, block,
        num_warps=min(16, max(1, block // 512)), **OPTIONS,
    )  # fmt: skip
    return d_qkv, d_weights[0].sum(0).to(qkv.dtype), d_weights[1].sum(0).to(qkv.dtype)


def cross_compile_cases(architecture: str) -> Iterator[Case]:
    """Every kernel at 257 tokens of 25 heads of 128, with masked blocks at 677, and at the 1025 of
    InternViT-300M with its heads of 64 and no norms."""
    sixteen_bits = ("qkv_ptr", "q_weight_ptr", "k_weight_ptr", "out_ptr", "d_out_ptr", "d_qkv_ptr")
    values: dict[str, object] = {
        **dict.fromkeys((*sixteen_bits, "folded_ptr"), "*bf16"),
        **dict.fromkeys(("rstd_ptr", "lse_ptr", "delta_ptr", "d_weights_ptr"), "*fp32"),
    }
    sizes = dict.fromkeys(("batch_stride", "token_stride", "part_stride", "head_stride"), "i32:16")
    sizes |= dict.fromkeys(("first_image", "B", "N", "H", "tiles"), "i32")
    values |= sizes | {"scale": "fp32", "eps": "fp32", "C": 3200}
    values |= {"D": 128, "BLOCK_D": 128, "NORM": True}

    def case(name, kernel, config, fp32=None, **constants):
        arguments = values | constants
        kept = {n: arguments[n] for n in kernel.arg_names if n in arguments and n not in config}
        return Case(
            "qk_norm_attention", name, kernel, kept, config, matrix=fp32 is not None, fp32=fp32
        )

    four = {"num_warps": 4, "num_stages": 1}
    yield case("statistics C=3200 bf16", statistics_kernel, four, BLOCK_C=4096)
    eight = {"num_warps": 8, "num_stages": 1}
    yield case("norm backward C=3200 bf16", norm_kernel, eight, BLOCK_C=4096)
    for N, D, width in ((257, 128, "wide"), (677, 128, "wide"), (1025, 64, "narrow")):
        for name, kernel, table, own, other in (
            ("forward", forward_kernel, FORWARD, "BLOCK_M", "BLOCK_N"),
            ("dq", queries_kernel, QUERIES, "BLOCK_M", "BLOCK_N"),
            ("dk and dv", keys_kernel, KEYS, "BLOCK_N", "BLOCK_M"),
        ):
            config, wide = table[width][architecture], table["fp32"][architecture]
            _, constants = _tiles(config, own, other, N)
            fp32 = wide, {"lse_ptr": "*fp64", **_tiles(wide, own, other, N)[1]}
            constants |= {"D": D, "BLOCK_D": D, "NORM": D == 128}
            yield case(f"{name} N={N} D={D} bf16", kernel, config, fp32, **constants)
