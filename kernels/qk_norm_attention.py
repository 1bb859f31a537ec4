"""InternViT's attention: RMSNorm of q and k over all heads together, inside softmax attention.

The norm spans all heads, so for a token it is one number, r = 1 / sqrt(mean(q**2) + eps), and

    score_ij = scale * sum_d (r_i wq_d q_id) (r'_j wk_d k_jd) = r'_j * sum_d f_id k_jd
    f_id = scale * r_i * wq_d * wk_d * q_id        rounded once to the input's dtype

One small pass gives r and r'; the weights and r are folded into a tile of q when it is loaded; k
goes to the matrix unit as it lies in memory, and r' multiplies columns of the fp32 scores. Normed
q and k are never written, and rounding once where the published model rounds four times halves the
error in bf16. Source: InternAttention in OpenGVLab/InternVL, modeling_intern_vit.py; the online
softmax is FlashAttention-2's (arXiv 2307.08691).

Tokens are 1 + patches: 257, 577, 677, 1025. In blocks of 64 keys that leaves one key in most
cases, which is not worth a block: the online softmax starts from it (its score is a dot product in
fp32) and only whole blocks remain, without masks. Of the query rows, what whole tiles leave over
gets a tile of its own size, 16 rows for 257, in the same launch and beside the tiles whose K and V
it shares: 272 rows are computed where 128-row tiles would take 384.

The gradient. With kh = k * r', g = d loss / d f (from dS k) and h = d loss / d kh (from dS^T f):

    dq = through the norm of wq * wk * scale * g      dk = through the norm of h
    dwq = wk * scale * sum over tokens of g * q * r   dwk = the same with wq in place of wk

so both weights need one sum. A token's reduction over all heads is a kernel of its own, one
program a token, in a fixed order. qkv is (B, N, 3, H, D); H = 25, D = 128. Bound by operations:
4 B N**2 H D forward and 2.5 times that backward.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from internvl_engine import reference

from ._attention import (
    FLASH,
    FLASH_BACKWARD,
    AttentionGradients,
    empty_output,
    flash_serves,
    log_sum_exp,
    needs_gradient,
    scale_of,
)
from ._attention_cpu import attention_native, bmm_backward, sdpa_cpu
from ._autograd import vjp
from ._heads import lse_dtype
from ._library import define, triton_launcher
from .rms_norm import rms_norm


class QKNormAttended(NamedTuple):
    """out (B, N, H, D), and for the gradient lse (B, H, N) and rstd (2, B, N), or nothing."""

    out: Tensor
    lse: Tensor
    rstd: Tensor


class QKNormGradients(NamedTuple):
    """Of the loss by qkv and by the weights, empty where those are None."""

    qkv: Tensor
    q_weight: Tensor
    k_weight: Tensor


def _normed_heads(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, N, D); q and k normed by the operator rms_norm, which reads qkv in place."""
    heads = qkv.shape[-2:]
    q, k, v = qkv.unbind(2)
    if q_weight is not None and k_weight is not None:
        q = rms_norm(q.flatten(2), q_weight, eps).unflatten(2, heads)
        k = rms_norm(k.flatten(2), k_weight, eps).unflatten(2, heads)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _saved(
    qkv: Tensor, q_weight: Tensor | None, eps: float, lse: Tensor | None, saves: bool
) -> tuple[Tensor, Tensor]:
    """(lse, rstd (2, B, N)) as the gradient needs them, both empty where it will not be asked."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    if not saves or lse is None:
        return qkv.new_empty(0, dtype=lse_dtype(qkv.dtype)), qkv.new_empty(0, dtype=wide)
    if q_weight is None:
        return lse.to(lse_dtype(qkv.dtype)).contiguous(), qkv.new_empty(0, dtype=wide)
    q_and_k = qkv[:, :, :2].flatten(3).to(wide)
    rstd = torch.rsqrt(q_and_k.square().mean(-1) + eps)
    return lse.to(lse_dtype(qkv.dtype)).contiguous(), rstd.permute(2, 0, 1).contiguous()


def qk_norm_attention_reference(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, scale: float,
    saves: bool,
) -> QKNormAttended:  # fmt: skip
    """The reference with what the gradient of another backend would need."""
    out = reference.qk_norm_attention(qkv, q_weight, k_weight, eps, scale).contiguous()
    lse = None
    if saves:
        q, k, _ = _normed_heads(qkv, q_weight, k_weight, eps)
        lse = log_sum_exp(q, k, None, scale)
    return QKNormAttended(out, *_saved(qkv, q_weight, eps, lse, saves))


def qk_norm_attention_native(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, scale: float,
    saves: bool,
) -> QKNormAttended:  # fmt: skip
    """csrc/cpu/attention.h, which reads qkv in place and folds the norms into the scores."""
    B, N, _, H, D = qkv.shape
    if qkv.stride()[-2:] != (D, 1):
        qkv = qkv.contiguous()
    norm, rstd = None, qkv.new_empty(0, dtype=torch.promote_types(qkv.dtype, torch.float32))
    if q_weight is not None and k_weight is not None:
        if not q_weight.dtype == k_weight.dtype == qkv.dtype:
            return NotImplemented
        statistics = qkv.new_empty((2, B, N), dtype=torch.float32)
        norm = q_weight.contiguous(), k_weight.contiguous(), eps, statistics
        rstd = statistics if saves else rstd
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    found = attention_native(q, k, v, "full", 0, None, scale, False, saves, norm)
    if found is NotImplemented:
        return NotImplemented
    return QKNormAttended(found.out.transpose(1, 2), found.lse, rstd)


def qk_norm_attention_sdpa(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, scale: float,
    saves: bool,
) -> QKNormAttended:  # fmt: skip
    """On the CPU: the norms, then PyTorch's blocked attention."""
    q, k, v = _normed_heads(qkv, q_weight, k_weight, eps)
    found = sdpa_cpu(q, k, v, None, scale)
    if found is NotImplemented:
        return NotImplemented
    out, lse = found
    return QKNormAttended(out.transpose(1, 2).contiguous(), *_saved(qkv, q_weight, eps, lse, saves))


def _flash_backend(attend):
    def run(qkv, q_weight, k_weight, eps, scale, saves):
        if not flash_serves(qkv):
            return NotImplemented
        out, lse = attend(*_normed_heads(qkv, q_weight, k_weight, eps), False, scale)
        return QKNormAttended(
            out.transpose(1, 2).contiguous(), *_saved(qkv, q_weight, eps, lse, saves)
        )

    return run


def qk_norm_attention_backward_bmm(
    grad: Tensor, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    out: Tensor, lse: Tensor, rstd: Tensor, eps: float, scale: float,
) -> QKNormGradients:  # fmt: skip
    """The gradient on the CPU: norms again, products, and the gradient of the norms."""
    if qkv.numel() == 0:
        return NotImplemented
    q, k, v = _normed_heads(qkv, q_weight, k_weight, eps)
    found = bmm_backward(grad.transpose(1, 2), q, k, v, None, scale)
    return _through_norms(found, qkv, q_weight, k_weight, eps)


def _through_norms(
    found: AttentionGradients, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    eps: float,
) -> QKNormGradients:  # fmt: skip
    """The gradients of qkv and the weights from those of the normed q, k and of v."""
    d_qkv = torch.stack([x.transpose(1, 2) for x in found], dim=2)
    if q_weight is None or k_weight is None:
        return QKNormGradients(d_qkv, qkv.new_empty(0), qkv.new_empty(0))
    d_weights = []
    for part, weight in enumerate((q_weight, k_weight)):
        d_part, d_weight = torch.ops.internvl.rms_norm_backward(
            d_qkv[:, :, part].flatten(2), qkv[:, :, part].flatten(2), weight, eps
        )
        d_qkv[:, :, part] = d_part.view(qkv[:, :, part].shape)
        d_weights.append(d_weight)
    return QKNormGradients(d_qkv, *d_weights)


def _flash_backward_backend(differentiate):
    """Others' gradients, of q and k normed again: they know no norms.

    The log-sum-exp may come from the folded form, which rounds q and k elsewhere; in large scores
    that shows. Their own forward pass, which the same `prefer` chooses, is the one that fits.
    """

    def run(grad, qkv, q_weight, k_weight, out, lse, rstd, eps, scale):
        if not flash_serves(qkv):
            return NotImplemented
        q, k, v = _normed_heads(qkv, q_weight, k_weight, eps)
        grad, out = grad.transpose(1, 2), out.transpose(1, 2)
        found = differentiate(grad, q, k, v, out, lse, False, scale)
        return _through_norms(found, qkv, q_weight, k_weight, eps)

    return run


def _backward_reference(
    grad: Tensor, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    out: Tensor, lse: Tensor, rstd: Tensor, eps: float, scale: float,
) -> QKNormGradients:  # fmt: skip
    wanted = (0,) if q_weight is None else (0, 1, 2)
    args = (qkv, q_weight, k_weight, eps, scale)
    d_qkv, *d_weights = vjp(reference.qk_norm_attention, args, wanted, (grad,))
    return QKNormGradients(d_qkv, *(d_weights or (qkv.new_empty(0), qkv.new_empty(0))))


def _fake(qkv, q_weight, k_weight, eps, scale, saves) -> QKNormAttended:
    B, N, _, H, D = qkv.shape
    rstd = (2, B, N) if saves and q_weight is not None else 0
    wide = torch.promote_types(qkv.dtype, torch.float32)
    lse = empty_output(qkv.new_empty((B, H, N, D)), saves).lse
    return QKNormAttended(qkv.new_empty((B, N, H, D)), lse, qkv.new_empty(rstd, dtype=wide))


def _save(ctx, inputs: tuple, output: QKNormAttended) -> None:
    qkv, q_weight, k_weight, ctx.eps, ctx.scale, saves = inputs
    out, lse, rstd = output
    ctx.mark_non_differentiable(lse, rstd)
    ctx.save_for_backward(qkv, q_weight, k_weight, *((out, lse, rstd) if saves else ()))


def _backward(ctx, grad: Tensor, *_) -> tuple:
    qkv, q_weight, k_weight, *saved = ctx.saved_tensors  # once: recomputation lets go of them
    args = qkv, q_weight, k_weight
    if not saved:  # the caller did not expect a gradient, as inside torch.func's transforms
        saved = _qk_norm_attention(*args, ctx.eps, ctx.scale, True)
    found = _qk_norm_attention_backward(grad, *args, *saved, ctx.eps, ctx.scale)
    d_weights = (None, None) if q_weight is None else found[1:]
    return found[0], *d_weights, None, None, None


_qk_norm_attention = define(
    "qk_norm_attention(Tensor qkv, Tensor? q_weight, Tensor? k_weight, float eps, float scale, "
    "bool saves) -> (Tensor, Tensor, Tensor)",
    reference=qk_norm_attention_reference,
    fake=_fake,
    cpu={"native": qk_norm_attention_native, "sdpa": qk_norm_attention_sdpa},
    cuda={
        "triton": triton_launcher("qk_norm_attention"),
        **{name: _flash_backend(attend) for name, attend in FLASH.items()},
    },
    backward=(_backward, _save),
    lower_in_autocast=True,
)

_qk_norm_attention_backward = define(
    "qk_norm_attention_backward(Tensor grad, Tensor qkv, Tensor? q_weight, Tensor? k_weight, "
    "Tensor out, Tensor lse, Tensor rstd, float eps, float scale) -> (Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=lambda grad, qkv, q_weight, k_weight, *rest: QKNormGradients(
        qkv.new_empty(qkv.shape),
        *(qkv.new_empty(0) if w is None else w.new_empty(w.shape) for w in (q_weight, k_weight)),
    ),
    cpu={"bmm": qk_norm_attention_backward_bmm},
    cuda={
        "triton": triton_launcher("qk_norm_attention", "qk_norm_attention_backward_triton"),
        **{name: _flash_backward_backend(run) for name, run in FLASH_BACKWARD.items()},
    },
)


def qk_norm_attention(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float = 1e-6,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention over qkv, with q and k normed over all heads together.

    Args:
        qkv: (B, N, 3, H, D), D up to 128 for the kernels; the last two dimensions contiguous, else
            it is copied. float32, float16 or bfloat16; float64 runs the reference.
        q_weight, k_weight: (H * D,), of the dtype of qkv, or float32 (then q, k and v are computed
            in float32, as PyTorch promotes them, which is slow: cast the weights). None, both, for
            attention without norms.
        eps: added to the mean squares.
        scale: of the scores; None is D ** -0.5.

    Returns:
        (B, N, H, D), contiguous, of the dtype to which qkv and the weights promote.

    Raises:
        ValueError: shapes or dtypes do not fit, only one weight is given, or scale is not positive.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qk_norm_attention: qkv must be (B, N, 3, H, D), got {tuple(qkv.shape)}")
    width = qkv.shape[-2] * qkv.shape[-1]
    if (q_weight is None) != (k_weight is None):
        raise ValueError("qk_norm_attention: give q_weight and k_weight, or neither")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and (
            weight.shape != (width,) or weight.dtype not in (qkv.dtype, torch.float32)
        ):
            raise ValueError(
                f"qk_norm_attention: {name} must be {qkv.dtype} or float32, of shape ({width},) to "
                f"go with qkv of shape {tuple(qkv.shape)}, got {weight.dtype} of shape "
                f"{tuple(weight.shape)}"
            )
    autocast = torch.is_autocast_enabled(qkv.device.type)
    if q_weight is not None and k_weight is not None and not autocast:
        if not qkv.dtype == q_weight.dtype == k_weight.dtype:
            dtype = torch.promote_types(q_weight.dtype, k_weight.dtype)
            qkv, q_weight, k_weight = (x.to(dtype) for x in (qkv, q_weight, k_weight))
    saves = needs_gradient(qkv, q_weight, k_weight)
    scale = scale_of(scale, qkv.shape[-1])
    return _qk_norm_attention(qkv, q_weight, k_weight, eps, scale, saves)[0]
