"""The attentions of the CPU: our own, and PyTorch's where that cannot serve.

All read q (B, H, S, D), k and v (B, Hk, T, D) in any strides. The gradients need no log-sum-exp:
they compute the probabilities again, rounded as in eager PyTorch.
"""

import torch
from torch import Tensor

from internvl_engine import reference

from ._attention import Attended, AttentionGradients, empty_output
from ._heads import adjacent, lse_dtype, pointer
from ._library import NATIVE_TYPES, address, native

# (q_weight, k_weight, eps, where the statistics (2, B, N) of q and k go, in float32)
Norm = tuple[Tensor, Tensor, float, Tensor]

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def attention_native(
    q: Tensor, k: Tensor, v: Tensor, mask: str, prefix: int, key_padding_mask: Tensor | None,
    scale: float, interleave: bool, saves: bool, norm: Norm | None = None,
    seen: Tensor | None = None,
) -> Attended:  # fmt: skip
    """csrc/cpu/attention.h, for every attention operator.

    seen: (r * B, H, S, T) bool of any strides but the last, which queries see which keys.

    Every head of keys is packed once for all rows of q that read it. In bfloat16 it is 2.7 to 3.6
    times as fast as PyTorch's blocked attention (benchmarks/results), with half the error of eager.
    """
    dtype = NATIVE_TYPES.get(q.dtype)
    if dtype is None or q.numel() == 0 or k.numel() == 0 or native.instruction_set() == "portable":
        return NotImplemented
    batch, heads, queries, dim = q.shape
    images, key_heads, keys, _ = k.shape
    q, k, v = adjacent(q), adjacent(k), adjacent(v)
    out = q.new_empty((batch, queries, heads, dim)).transpose(1, 2)
    lse = q.new_empty((batch, heads, queries) if saves else 0, dtype=torch.float32)
    q_weight, k_weight, eps, rstd = norm or (None, None, 0.0, None)
    key_padding_mask = None if key_padding_mask is None else key_padding_mask.contiguous()
    native.attention(
        dtype, pointer(q), pointer(k), pointer(v), pointer(out), address(lse if saves else None),
        (address(q_weight), address(k_weight), address(rstd)), eps,
        reference.MASKS.index(mask), prefix, address(key_padding_mask),
        (0, 0, 0, 0) if seen is None else pointer(seen),
        (images, batch // images, heads, key_heads, queries, keys, dim), interleave, scale,
        torch.get_num_threads(),
    )  # fmt: skip
    return Attended(out, lse.to(lse_dtype(q.dtype)))


def bmm_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> AttentionGradients:
    """The gradient on the CPU by PyTorch's matrix products, a few heads at a time: scores stay in
    cache. In bfloat16 1.6 to 3.0 times as fast as PyTorch's blocked gradient (benchmarks/results).

    The probabilities are computed again and rounded as in eager PyTorch: no log-sum-exp is needed.
    bias: (1 or B, 1, S, T), added to the scores of each block of S rows of q; None for no mask.
    """
    B, H, S, _ = q.shape
    T = k.shape[2]
    dq, dk, dv = (empty_output(x, False).out for x in (q, k, v))
    at_once = max(torch.get_num_threads(), (1 << 20) // (S * T * q.element_size()))
    rows = min(B, max(1, at_once // H))
    heads = min(at_once, rows * H)  # of one row, or all of several
    buffers = q.new_empty((3, heads, S, T))
    for first_row in range(0, B, rows):
        here = slice(first_row, min(first_row + rows, B))
        grad_, q_, k_, v_ = (x[here].contiguous().flatten(0, 1) for x in (grad, q, k, v))
        dq_, dk_, dv_ = torch.empty_like(q_), torch.empty_like(k_), torch.empty_like(v_)
        for first in range(0, len(q_), heads):
            some = slice(first, first + heads)
            scores, p, dp = (x[: len(q_[some])] for x in buffers)
            torch.baddbmm(scores, q_[some], k_[some].mT, beta=0, alpha=scale, out=scores)
            if bias is not None:
                by_block = scores.unflatten(1, (-1, bias.shape[2]))
                by_block.unflatten(0, (here.stop - first_row, -1)).add_(
                    (bias[here] if len(bias) > 1 else bias)[:, :, None]
                )
            torch.softmax(scores, -1, out=p)
            torch.bmm(p.mT, grad_[some], out=dv_[some])
            torch.bmm(grad_[some], v_[some].mT, out=dp)
            torch._softmax_backward_data(dp, p, -1, q.dtype, grad_input=scores)
            torch.baddbmm(dq_[some], scores, k_[some], beta=0, alpha=scale, out=dq_[some])
            torch.baddbmm(dk_[some], scores.mT, q_[some], beta=0, alpha=scale, out=dk_[some])
        for whole, part in ((dq, dq_), (dk, dk_), (dv, dv_)):
            whole[here] = part.unflatten(0, (-1, H))
    return AttentionGradients(dq, dk, dv)


def sdpa_cpu(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float):
    """PyTorch's blocked attention on the CPU. bias: added to the scores, -inf for a hidden key."""
    if q.dtype == torch.float64:
        return NotImplemented
    if q.numel() == 0 or k.numel() == 0:  # PyTorch 2.13 divides by zero
        return NotImplemented
    # It reads heads that are not contiguous as if they were.
    return _flash(adjacent(q), adjacent(k), adjacent(v), 0.0, False, attn_mask=bias, scale=scale)
