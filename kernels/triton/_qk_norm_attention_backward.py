"""The gradient of qk_norm_attention in Triton. The formulas: kernels/qk_norm_attention.py.

Three kernels and no atomics, so twice the same bits: one tile of queries walks over the keys (dq),
one tile of keys walks over the queries (dk, dv), and one token takes its dq and dk through the norm
over all heads. With qf = q * rstd_q * q_weight * k_weight and kh = k * rstd_k, the first two write
d loss / d qf and d loss / d kh; the third turns them, in place, into the gradients of q and k. Both
compute their scores from the folded q exactly as the forward pass did: were k folded instead, an
outlier channel would make p differ between them, and rows of score gradients would not sum to 0.
"""

import triton
import triton.language as tl

from ._attention_core import (
    LOG2E,
    exp2,
    load_lse,
    load_row,
    load_tile,
    probabilities,
    product,
    score_gradient,
    score_gradient_by_key,
    store_at,
)


@triton.jit
def _unit(rstd_ptr, N, DTYPE: tl.constexpr, NORM: tl.constexpr):
    """What keeps (gradient * rstd) in the range of fp16: one over the image's largest rstd."""
    largest = 1.0
    if NORM and DTYPE == tl.float16:
        largest = 0.0
        for start in range(0, N, 1024):
            tokens = start + tl.arange(0, 1024)
            rstd = tl.load(rstd_ptr + tokens, mask=tokens < N, other=0.0)
            largest = tl.maximum(largest, tl.max(rstd, axis=0))
    return 1.0 / largest


@triton.jit
def _exact_delta(
    q, d_out, lse, lse_low, k_ptr, v_ptr, rstd_ptr, N, token_stride, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """sum_j p_ij dp_ij, which in fp32 has half the error of sum_d out_id * d_out_id."""
    delta = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, N, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k = load_tile(k_ptr, keys, token_stride, N, D, BLOCK_D, MASKED=True)
        v = load_tile(v_ptr, keys, token_stride, N, D, BLOCK_D, MASKED=True)
        scores = product(q, k.T)
        if NORM:
            scores *= tl.load(rstd_ptr + keys, mask=keys < N, other=0.0)[None, :]
        p = probabilities(scores, scale, lse[:, None], lse_low[:, None], v.dtype)
        p = tl.where((keys < N)[None, :], p, 0.0)
        delta += tl.sum(p * product(d_out, v.T), axis=1)
    return delta


@triton.jit
def _walk_over_keys(
    q, d_out, lse, lse_low, delta, k_ptr, v_ptr, rstd_ptr, start, N, token_stride, scale, unit, dq,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    NORM: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what the keys [start, start + BLOCK_N) give to dq."""
    keys = start + tl.arange(0, BLOCK_N)
    k = load_tile(k_ptr, keys, token_stride, N, D, BLOCK_D, MASKED)
    v = load_tile(v_ptr, keys, token_stride, N, D, BLOCK_D, MASKED)
    scores = product(q, k.T)
    rstd = tl.full([BLOCK_N], 1.0, tl.float32)
    if NORM:
        rstd = tl.load(rstd_ptr + keys, mask=keys < N, other=0.0)
        scores *= rstd[None, :]
    if MASKED:
        scores = tl.where((keys < N)[None, :], scores, float("-inf"))
    p = probabilities(scores, scale, lse[:, None], lse_low[:, None], v.dtype)
    d_scores = score_gradient(p, v, d_out, delta)
    if NORM:
        d_scores *= (rstd * unit)[None, :]
    return tl.dot(d_scores.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def _queries_tile(
    q_ptr, k_ptr, v_ptr, fold, rstd_ptr, k_rstd_ptr, out_ptr, d_out_ptr, lse_ptr, delta_ptr, dq_ptr,
    first_row, N, token_stride, out_stride, dq_stride, scale, unit, folded_ptr, unfold,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NORM: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """delta and dq of the query rows [first_row, first_row + BLOCK_M) of one head."""
    rows = first_row + tl.arange(0, BLOCK_M)
    q = load_tile(q_ptr, rows, token_stride, N, D, BLOCK_D, MASKED=True)
    if NORM:
        rstd = tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)
        q = (q.to(tl.float32) * rstd[:, None] * fold[None, :]).to(q.dtype)
        store_at(folded_ptr, rows * out_stride, rows < N, q, D, BLOCK_D)
    out = load_tile(out_ptr, rows, out_stride, N, D, BLOCK_D, MASKED=True)
    d_out = load_tile(d_out_ptr, rows, out_stride, N, D, BLOCK_D, MASKED=True)
    lse, lse_low = load_lse(lse_ptr + rows, rows < N)
    if q.dtype == tl.float32:
        delta = _exact_delta(
            q, d_out, lse, lse_low, k_ptr, v_ptr, k_rstd_ptr, N, token_stride, scale,
            D, BLOCK_D, BLOCK_M, BLOCK_N, NORM,
        )  # fmt: skip
    else:
        delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), axis=1)
    tl.store(delta_ptr + rows, delta, mask=rows < N)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if PEEL:
        last_rstd = 1.0
        if NORM:
            last_rstd = tl.load(k_rstd_ptr + N - 1)
        last_key = load_row(k_ptr + (N - 1) * token_stride, D, BLOCK_D)
        last_value = load_row(v_ptr + (N - 1) * token_stride, D, BLOCK_D)
        score = tl.sum(q.to(tl.float32) * last_key[None, :], axis=1) * (last_rstd * scale)
        d_p = tl.sum(d_out.to(tl.float32) * last_value[None, :], axis=1)
        d_score = exp2(score - lse - lse_low, q.dtype) * (d_p - delta)
        dq += (d_score * (last_rstd * unit))[:, None] * last_key[None, :]
    whole = N // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        dq = _walk_over_keys(
            q, d_out, lse, lse_low, delta, k_ptr, v_ptr, k_rstd_ptr, start, N, token_stride, scale,
            unit, dq, D, BLOCK_D, BLOCK_N, NORM, MASKED=False,
        )  # fmt: skip
    if not PEEL:  # at most once; as a loop it needs fewer registers than as an `if`
        for start in range(whole, N, BLOCK_N):
            dq = _walk_over_keys(
                q, d_out, lse, lse_low, delta, k_ptr, v_ptr, k_rstd_ptr, start, N, token_stride,
                scale, unit, dq, D, BLOCK_D, BLOCK_N, NORM, MASKED=True,
            )  # fmt: skip
    store_at(dq_ptr, rows * dq_stride, rows < N, dq * unfold, D, BLOCK_D)


@triton.jit
def _walk_over_queries(
    k, v, rstd, q_ptr, d_out_ptr, lse_ptr, delta_ptr, start, N, q_stride, out_stride, scale, dk, dv,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds what the queries [start, start + BLOCK_M) give to dk and dv."""
    rows = start + tl.arange(0, BLOCK_M)
    q = load_tile(q_ptr, rows, q_stride, N, D, BLOCK_D, MASKED)
    d_out = load_tile(d_out_ptr, rows, out_stride, N, D, BLOCK_D, MASKED)
    lse, lse_low = load_lse(lse_ptr + rows, rows < N)
    delta = tl.load(delta_ptr + rows, mask=rows < N, other=0.0)
    scores = product(k, q.T) * rstd[:, None]
    p = probabilities(scores, scale, lse[None, :], lse_low[None, :], v.dtype)
    d_scores, dv = score_gradient_by_key(p, v, d_out, delta, dv)
    return tl.dot(d_scores.to(q.dtype), q, dk, input_precision="ieee"), dv


@triton.jit
def _keys_tile(
    q_ptr, k_ptr, v_ptr, rstd_ptr, d_out_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    first_key, N, q_stride, token_stride, out_stride, dk_stride, scale, unfold,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NORM: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """dk and dv of the keys [first_key, first_key + BLOCK_N) of one head."""
    keys = first_key + tl.arange(0, BLOCK_N)
    k = load_tile(k_ptr, keys, token_stride, N, D, BLOCK_D, MASKED=True)
    v = load_tile(v_ptr, keys, token_stride, N, D, BLOCK_D, MASKED=True)
    rstd = tl.full([BLOCK_N], 1.0, tl.float32)
    if NORM:
        rstd = tl.load(rstd_ptr + keys, mask=keys < N, other=0.0)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if PEEL:
        last_query = load_row(q_ptr + (N - 1) * q_stride, D, BLOCK_D)
        last_d_out = load_row(d_out_ptr + (N - 1) * out_stride, D, BLOCK_D)
        score = tl.sum(k.to(tl.float32) * last_query[None, :], axis=1) * rstd * scale
        lse, lse_low = load_lse(lse_ptr + N - 1, N > 0)
        p = exp2(score - lse - lse_low, v.dtype)
        d_p = tl.sum(v.to(tl.float32) * last_d_out[None, :], axis=1)
        d_score = p * (d_p - tl.load(delta_ptr + N - 1))
        dk += d_score[:, None] * last_query[None, :]
        dv += p[:, None] * last_d_out[None, :]
    whole = N // BLOCK_M * BLOCK_M
    for start in range(0, whole, BLOCK_M):
        dk, dv = _walk_over_queries(
            k, v, rstd, q_ptr, d_out_ptr, lse_ptr, delta_ptr, start, N, q_stride, out_stride, scale,
            dk, dv, D, BLOCK_D, BLOCK_M, MASKED=False,
        )  # fmt: skip
    if not PEEL:  # at most once; as a loop it needs fewer registers than as an `if`
        for start in range(whole, N, BLOCK_M):
            dk, dv = _walk_over_queries(
                k, v, rstd, q_ptr, d_out_ptr, lse_ptr, delta_ptr, start, N, q_stride, out_stride,
                scale, dk, dv, D, BLOCK_D, BLOCK_M, MASKED=True,
            )  # fmt: skip
    store_at(dk_ptr, keys * dk_stride, keys < N, dk * unfold, D, BLOCK_D)
    store_at(dv_ptr, keys * dk_stride, keys < N, dv, D, BLOCK_D)


@triton.jit(do_not_specialize=["B", "N", "H", "tiles"])
def queries_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, rstd_ptr, out_ptr, d_out_ptr, lse_ptr, delta_ptr,
    d_qkv_ptr, folded_ptr, batch_stride, token_stride, part_stride, head_stride, B, N, H, scale,
    tiles,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr,
    BLOCK_N: tl.constexpr, NORM: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """One program: delta, folded q and dq (see norm_kernel) of BLOCK_M, or TAIL_M, rows."""
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles % H).to(tl.int64)
    batch = (tl.program_id(0) // tiles // H).to(tl.int64)
    q_ptr = qkv_ptr + batch * batch_stride + head * head_stride
    k_ptr = q_ptr + part_stride
    v_ptr = k_ptr + part_stride
    out_ptr += (batch * N * H + head) * D
    d_out_ptr += (batch * N * H + head) * D
    dq_ptr = d_qkv_ptr + (batch * N * 3 * H + head) * D
    lse_ptr += (batch * H + head) * N
    delta_ptr += (batch * H + head) * N
    q_rstd_ptr = rstd_ptr + batch * N
    k_rstd_ptr = q_rstd_ptr + B * N
    unit = _unit(k_rstd_ptr, N, qkv_ptr.dtype.element_ty, NORM)
    unfold = scale / unit
    scale *= LOG2E
    fold = tl.zeros([BLOCK_D], tl.float32)
    if NORM:
        folded_ptr += (batch * N * H + head) * D
        fold = load_row(q_weight_ptr + head * D, D, BLOCK_D)
        fold *= load_row(k_weight_ptr + head * D, D, BLOCK_D) * scale
        scale = 1.0
    if TAIL_M == 0 or tile < tiles - 1:
        _queries_tile(
            q_ptr, k_ptr, v_ptr, fold, q_rstd_ptr, k_rstd_ptr, out_ptr, d_out_ptr, lse_ptr,
            delta_ptr, dq_ptr, tile * BLOCK_M, N, token_stride, H * D, 3 * H * D, scale, unit,
            folded_ptr, unfold, D, BLOCK_D, BLOCK_M, BLOCK_N, NORM, PEEL,
        )  # fmt: skip
    else:
        _queries_tile(
            q_ptr, k_ptr, v_ptr, fold, q_rstd_ptr, k_rstd_ptr, out_ptr, d_out_ptr, lse_ptr,
            delta_ptr, dq_ptr, tile * BLOCK_M, N, token_stride, H * D, 3 * H * D, scale, unit,
            folded_ptr, unfold, D, BLOCK_D, TAIL_M, BLOCK_N, NORM, PEEL,
        )  # fmt: skip


@triton.jit(do_not_specialize=["B", "N", "H", "tiles"])
def keys_kernel(
    qkv_ptr, folded_ptr, rstd_ptr, d_out_ptr, lse_ptr, delta_ptr, d_qkv_ptr,
    batch_stride, token_stride, part_stride, head_stride, B, N, H, scale, tiles,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, TAIL_N: tl.constexpr,
    BLOCK_M: tl.constexpr, NORM: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of k * rstd and of v, of BLOCK_N, or TAIL_N, keys of one head."""
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles % H).to(tl.int64)
    batch = (tl.program_id(0) // tiles // H).to(tl.int64)
    q_ptr = qkv_ptr + batch * batch_stride + head * head_stride
    q_stride = token_stride
    k_ptr = q_ptr + part_stride
    v_ptr = k_ptr + part_stride
    d_out_ptr += (batch * N * H + head) * D
    dk_ptr = d_qkv_ptr + (batch * N * 3 * H + H + head) * D
    lse_ptr += (batch * H + head) * N
    delta_ptr += (batch * H + head) * N
    unfold = scale
    scale *= LOG2E
    if NORM:  # the queries as the forward pass rounded them, so that p is the same
        q_ptr = folded_ptr + (batch * N * H + head) * D
        q_stride = H * D
        unfold = 1.0 / LOG2E
        scale = 1.0
    if TAIL_N == 0 or tile < tiles - 1:
        _keys_tile(
            q_ptr, k_ptr, v_ptr, rstd_ptr + (B + batch) * N, d_out_ptr, lse_ptr, delta_ptr, dk_ptr,
            dk_ptr + H * D, tile * BLOCK_N, N, q_stride, token_stride, H * D, 3 * H * D, scale,
            unfold, D, BLOCK_D, BLOCK_M, BLOCK_N, NORM, PEEL,
        )  # fmt: skip
    else:
        _keys_tile(
            q_ptr, k_ptr, v_ptr, rstd_ptr + (B + batch) * N, d_out_ptr, lse_ptr, delta_ptr, dk_ptr,
            dk_ptr + H * D, tile * BLOCK_N, N, q_stride, token_stride, H * D, 3 * H * D, scale,
            unfold, D, BLOCK_D, BLOCK_M, TAIL_N, NORM, PEEL,
        )  # fmt: skip


@triton.jit(do_not_specialize=["B", "N"])
def norm_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, rstd_ptr, d_qkv_ptr, d_weights_ptr,
    batch_stride, token_stride, part_stride, B, N, C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Takes gradients through the norm, in place: of q (program_id(1) = 0) or of k (1).

    One program serves the tokens program_id(0), + num_programs(0), ... With those of q it writes
    its part of the weights' gradients, one row of each d_weights[part] (num_programs(0), C): both
    weights only meet their product, so the gradient of one is the other times a common sum.
    """
    part = tl.program_id(1)
    cols = tl.arange(0, BLOCK_C)
    mask = cols < C
    q_weight = tl.load(q_weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    k_weight = tl.load(k_weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    common = tl.zeros([BLOCK_C], tl.float32)
    for token in range(tl.program_id(0), B * N, tl.num_programs(0)):
        row = tl.cast(token, tl.int64)
        x_ptr = qkv_ptr + row // N * batch_stride + row % N * token_stride + part * part_stride
        grad_ptr = d_qkv_ptr + (row * 3 + part) * C
        rstd = tl.load(rstd_ptr + part * B * N + row)
        normed = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32) * rstd
        grad = tl.load(grad_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if part == 0:
            common += grad * normed
            grad *= q_weight * k_weight
        grad = rstd * (grad - normed * (tl.sum(grad * normed, axis=0) / C))
        tl.store(grad_ptr + cols, grad.to(d_qkv_ptr.dtype.element_ty), mask=mask)
    if part == 0:
        d_q_weight_ptr = d_weights_ptr + tl.program_id(0) * C
        d_k_weight_ptr = d_q_weight_ptr + tl.num_programs(0) * C
        tl.store(d_q_weight_ptr + cols, common * k_weight, mask=mask)
        tl.store(d_k_weight_ptr + cols, common * q_weight, mask=mask)
