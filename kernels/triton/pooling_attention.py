"""pooling_attention in Triton. What it computes: kernels/pooling_attention.py.

Two kernels that both read x: scores and norm statistics of a block of tokens, then the weighted
mean of a block of channels over all tokens. One kernel with an online softmax would have to write
and combine (16, C) partial sums for every block of tokens, which is as much traffic as reading x
again, and could not spread one image over more than a few programs; this spreads it over N / 16 and
then C / 128.

With n = (x - mean) * rstd: query . n = rstd * (query . x - mean * sum(query)), and
sum_j p_j n_j = sum_j (p_j * rstd_j) x_j - sum_j p_j * rstd_j * mean_j.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._attention_core import length_class, product
from ._cross_compile import Case
from ._sizes import cdiv, power_of_2
from ._tuning import ARCHITECTURES, Config, launch_config, size_class

SCORES = dict.fromkeys(ARCHITECTURES, {"BLOCK_N": 16, "num_warps": 4, "num_stages": 2})
MEANS = dict.fromkeys(ARCHITECTURES, {"BLOCK_N": 32, "num_warps": 4, "num_stages": 2})
CANDIDATES = [
    {"BLOCK_N": block, "num_warps": num_warps, "num_stages": num_stages}
    for block in (16, 32, 64)
    for num_warps in (2, 4, 8)
    for num_stages in (1, 2, 3)
]
BLOCK_C = 128


@triton.jit(do_not_specialize=["H", "N"])
def _scores_kernel(
    query_ptr, x_ptr, scores_ptr, statistics_ptr, x_batch_stride, x_stride, H, N, eps,
    C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: scores (B, H, N), mean and rstd (B, 2, N) of BLOCK_N tokens of one image."""
    batch = tl.program_id(0).to(tl.int64)
    tokens = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    heads = tl.arange(0, BLOCK_H)
    x_ptrs = x_ptr + batch * x_batch_stride + tokens[:, None] * x_stride
    query_ptrs = query_ptr + (batch * H + heads)[:, None] * C
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        mask = (tokens < N)[:, None] & (cols < C)[None, :]
        x = tl.load(x_ptrs + cols[None, :], mask=mask, other=0.0)
        total += tl.sum(x.to(tl.float32), axis=1)
    mean = tl.div_rn(total, C)
    squares = tl.zeros([BLOCK_N], tl.float32)
    scores = tl.zeros([BLOCK_H, BLOCK_N], tl.float32)
    query_sum = tl.zeros([BLOCK_H], tl.float32)
    for start in range(0, C, BLOCK_C):  # the second read comes from the L1 or L2 cache
        cols = start + tl.arange(0, BLOCK_C)
        mask = (tokens < N)[:, None] & (cols < C)[None, :]
        x = tl.load(x_ptrs + cols[None, :], mask=mask, other=0.0)
        centred = tl.where(mask, x.to(tl.float32) - mean[:, None], 0.0)
        squares += tl.sum(centred * centred, axis=1)
        mask = (heads < H)[:, None] & (cols < C)[None, :]
        query = tl.load(query_ptrs + cols[None, :], mask=mask, other=0.0)
        query_sum += tl.sum(query.to(tl.float32), axis=1)
        scores += product(query, x.T)
    rstd = tl.rsqrt(tl.div_rn(squares, C) + eps)
    scores = (scores - query_sum[:, None] * mean[None, :]) * rstd[None, :]
    mask = (heads < H)[:, None] & (tokens < N)[None, :]
    tl.store(scores_ptr + (batch * H + heads)[:, None] * N + tokens[None, :], scores, mask=mask)
    tl.store(statistics_ptr + batch * 2 * N + tokens, mean, mask=tokens < N)
    tl.store(statistics_ptr + (batch * 2 + 1) * N + tokens, rstd, mask=tokens < N)


@triton.jit(do_not_specialize=["H", "N"])
def _means_kernel(
    x_ptr, scores_ptr, statistics_ptr, out_ptr, x_batch_stride, x_stride, H, N,
    C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C channels of the weighted means of one image."""
    batch = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, BLOCK_H)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    scores_ptrs = scores_ptr + (batch * H + heads)[:, None] * N
    mean_ptr = statistics_ptr + batch * 2 * N
    largest = tl.full([BLOCK_H], float("-inf"), tl.float32)
    unit = 0.0  # the largest rstd: p * rstd / unit stays in the range of fp16
    for start in range(0, N, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        mask = (tokens < N)[None, :]
        scores = tl.load(scores_ptrs + tokens[None, :], mask=mask, other=float("-inf"))
        largest = tl.maximum(largest, tl.max(scores, axis=1))
        rstd = tl.load(mean_ptr + N + tokens, mask=tokens < N, other=0.0)
        unit = tl.maximum(unit, tl.max(rstd, axis=0))
    total = tl.zeros([BLOCK_H], tl.float32)
    shift = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    for start in range(0, N, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)
        mask = (tokens < N)[None, :]
        scores = tl.load(scores_ptrs + tokens[None, :], mask=mask, other=float("-inf"))
        p = tl.exp(scores - largest[:, None])
        mean = tl.load(mean_ptr + tokens, mask=tokens < N, other=0.0)
        rstd = tl.load(mean_ptr + N + tokens, mask=tokens < N, other=0.0)
        p_rstd = p * tl.div_rn(rstd, unit)[None, :]
        mask = (tokens < N)[:, None] & (cols < C)[None, :]
        x_ptrs = x_ptr + batch * x_batch_stride + tokens[:, None].to(tl.int64) * x_stride
        x = tl.load(x_ptrs + cols[None, :], mask=mask, other=0.0)
        total += tl.sum(p, axis=1)
        shift += tl.sum(p_rstd * mean[None, :], axis=1)
        high = p_rstd.to(x.dtype)
        acc += product(high, x)
        if x.dtype != tl.float32:  # what 16 bits round off the weights: eager keeps them in fp32
            acc += product((p_rstd - high.to(tl.float32)).to(x.dtype), x)
    out = ((acc - shift[:, None]) * tl.div_rn(unit, total)[:, None]).to(out_ptr.dtype.element_ty)
    out_ptrs = out_ptr + (batch * H + heads)[:, None] * C + cols[None, :]
    tl.store(out_ptrs, out, mask=(heads < H)[:, None] & (cols < C)[None, :])


def pooling_attention_triton(
    query: Tensor, x: Tensor, eps: float, configs: tuple[Config, Config] | None = None
) -> Tensor:
    """Returns (B, H, C); takes CPU tensors interpreted."""
    B, H, C = query.shape
    N = x.shape[1]
    if x.dtype == torch.float64 or query.dtype != x.dtype or H > 64:
        return NotImplemented
    out = query.new_empty((B, H, C))
    if out.numel() == 0 or N == 0:
        return out.zero_()
    query = query.contiguous()
    x = x if x.stride(-1) == 1 else x.contiguous()
    scores = query.new_empty((B, H, N), dtype=torch.float32)
    statistics = query.new_empty((B, 2, N), dtype=torch.float32)
    constants = {"C": C, "BLOCK_H": max(16, power_of_2(H)), "BLOCK_C": BLOCK_C}

    def score(config: Config) -> None:
        _scores_kernel[(B, cdiv(N, config["BLOCK_N"]))](
            query, x, scores, statistics, *x.stride()[:2], H, N, eps, **constants, **config
        )

    def average(config: Config) -> None:
        _means_kernel[(B, cdiv(C, BLOCK_C))](
            x, scores, statistics, out, *x.stride()[:2], H, N, **constants, **config
        )

    key, device = (C, x.dtype, size_class(B), length_class(N)), x.get_device()
    for index, (run, name, defaults) in enumerate(
        ((score, "scores", SCORES), (average, "means", MEANS))
    ):
        chosen = configs and configs[index]
        run(chosen or launch_config(
            f"pooling_attention_{name}", key, defaults, CANDIDATES, run, device
        ))  # fmt: skip
    return out


def cross_compile_cases(architecture: str) -> Iterator[Case]:
    """16 queries of 3200 channels."""
    arguments = {
        **dict.fromkeys(("query_ptr", "x_ptr", "out_ptr"), "*bf16"), "scores_ptr": "*fp32",
        "statistics_ptr": "*fp32", "x_batch_stride": "i32:16", "x_stride": "i32:16",
        "H": "i32", "N": "i32", "eps": "fp32", "C": 3200, "BLOCK_H": 16, "BLOCK_C": BLOCK_C,
    }  # fmt: skip
    kernels = (("scores", _scores_kernel, SCORES), ("means", _means_kernel, MEANS))
    for name, kernel, table in kernels:
        kept = {n: arguments[n] for n in kernel.arg_names if n in arguments}
        yield Case("pooling_attention", f"{name} C=3200 bf16", kernel, kept, table[architecture])
