"""Cross-attention of QLLaMA's 96 queries to the vision tokens, K and V shared by several rows.

    out_i = softmax(scale * q_i k^T) v        k, v of image i % B, or i // r where interleaved

Training repeats the batch r times (`repeat_time`) and beam search repeats every image; the keys and
values of an image are read in place for all its rows and never copied, and their gradients are
summed over those rows inside the kernel, in a fixed order. Rounding as in kernels/attention.py.
Source: LlamaCrossAttention in OpenGVLab/InternVL, modeling_qllama.py; the split over keys is
FlashDecoding's.

q is (r * B, H, 96, D), k and v (B, H, N, D): H = 32, D = 128, N = 257 to 1025. Bound by operations
at large batches; at batch 1 by latency, where the keys are split so that the GPU fills.
"""

import torch
from torch import Tensor

from internvl_engine import reference

from ._attention import (
    FLASH,
    all_as_projected,
    as_projected,
    empty_output,
    flash_serves,
    log_sum_exp,
    lse_dtype,
    needs_gradient,
    scale_of,
)
from ._attention_cpu import attention_native, bmm_backward, sdpa_cpu
from ._autograd import gradient
from ._library import define, triton_launcher

Three = tuple[Tensor, Tensor, Tensor]
Pair = tuple[Tensor, Tensor]


def _packed(q: Tensor, images: int, interleave: bool) -> Tensor:
    """q (r * B, H, S, D) as (B, H, r * S, D): one block of rows an image."""
    heads = (q.unflatten(0, (images, -1)) if interleave else
             q.unflatten(0, (-1, images)).transpose(0, 1))  # fmt: skip
    return heads.transpose(1, 2).flatten(2, 3)


def _unpacked(x: Tensor, repeat: int, interleave: bool) -> Tensor:
    """The inverse of _packed, for (B, H, r * S, ...)."""
    x = x.unflatten(2, (repeat, -1)).transpose(1, 2)
    return (x if interleave else x.transpose(0, 1)).flatten(0, 1)


def cross_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, interleave: bool, scale: float, saves: bool
) -> Pair:
    """The reference with the log-sum-exp that another backend's gradient would need."""
    if q.numel() == 0 or k.shape[2] == 0:
        out, lse = empty_output(q, saves)
        return out.zero_(), lse.fill_(float("-inf"))
    out = as_projected(reference.cross_attention(q, k, v, interleave, scale))
    if not saves:
        return out, empty_output(q, False)[1]
    repeat = q.shape[0] // k.shape[0]
    shared = k.repeat_interleave(repeat, 0) if interleave else k.repeat(repeat, 1, 1, 1)
    return out, log_sum_exp(q, shared, None, scale)


def cross_attention_native(
    q: Tensor, k: Tensor, v: Tensor, interleave: bool, scale: float, saves: bool
) -> Pair:
    """Every head of an image is packed once for all its rows of q: csrc/cpu/attention.h."""
    return attention_native(q, k, v, "full", 0, None, scale, saves, interleave)


def cross_attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, interleave: bool, scale: float, saves: bool
) -> Pair:
    """PyTorch's blocked attention on the CPU, the rows of an image below each other."""
    if q.numel() == 0:
        return NotImplemented
    images = k.shape[0]
    found = sdpa_cpu(_packed(q, images, interleave), k, v, None, scale)
    if found is NotImplemented:
        return NotImplemented
    out, lse = (_unpacked(x, q.shape[0] // images, interleave) for x in found)
    lse = lse.to(lse_dtype(q.dtype)).contiguous()
    return as_projected(out), lse if saves else lse.new_empty(0)


def cross_attention_backward_bmm(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, interleave: bool,
    scale: float,
) -> Three:  # fmt: skip
    """The gradient on the CPU, the rows of an image below each other."""
    if q.numel() == 0 or k.numel() == 0:
        return NotImplemented
    images = k.shape[0]
    grad, packed = (_packed(x, images, interleave) for x in (grad, q))
    dq, dk, dv = bmm_backward(grad, packed, k, v, None, scale)
    return as_projected(_unpacked(dq, q.shape[0] // images, interleave)), dk, dv


def _flash_backend(attend):
    def run(q, k, v, interleave, scale, saves):
        if not flash_serves(q):
            return NotImplemented
        images = k.shape[0]
        found = attend(_packed(q, images, interleave), k, v, False, scale)
        out, lse = (_unpacked(x, q.shape[0] // images, interleave) for x in found)
        return as_projected(out), lse.contiguous() if saves else lse.new_empty(0)

    return run


def _backward_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, interleave: bool,
    scale: float,
) -> Three:  # fmt: skip
    if q.numel() == 0 or k.shape[2] == 0:
        return all_as_projected(torch.zeros_like(x) for x in (q, k, v))

    def attend(q, k, v):
        return reference.cross_attention(q, k, v, interleave, scale)

    return all_as_projected(gradient(attend, wanted=(0, 1, 2))(grad, q, k, v))


def _save(ctx, inputs: tuple, output: Pair) -> None:
    q, k, v, ctx.interleave, ctx.scale, saves = inputs
    assert saves or not q.requires_grad, "called for a gradient with saves=False"
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx, grad: Tensor, _) -> tuple:
    grads = _cross_attention_backward(grad, *ctx.saved_tensors, ctx.interleave, ctx.scale)
    return *grads, None, None, None


_cross_attention = define(
    "cross_attention(Tensor q, Tensor k, Tensor v, bool interleave, float scale, bool saves) "
    "-> (Tensor, Tensor)",
    reference=cross_attention_reference,
    fake=lambda q, k, v, interleave, scale, saves: empty_output(q, saves),
    cpu={"native": cross_attention_native, "sdpa": cross_attention_sdpa},
    cuda={
        "triton": triton_launcher("cross_attention"),
        **{name: _flash_backend(attend) for name, attend in FLASH.items()},
    },
    backward=(_backward, _save),
    lower_in_autocast=True,
)

_cross_attention_backward = define(
    "cross_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "bool interleave, float scale) -> (Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=lambda grad, q, k, v, *rest: tuple(empty_output(x, False)[0] for x in (q, k, v)),
    cpu={"bmm": cross_attention_backward_bmm},
    cuda={"triton": triton_launcher("cross_attention", "cross_attention_backward_triton")},
)


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, interleave: bool = False, scale: float | None = None
) -> Tensor:
    """Softmax attention of every query to all keys of its image.

    Args:
        q: (r * B, H, S, D). Any strides, but a head that is not contiguous along D is copied. D up
            to 128 for the kernels; float32, float16 or bfloat16; float64 runs the reference.
        k, v: (B, H, N, D), the dtype of q.
        interleave: whether row i of q belongs to image i // r, as beams do, and not to i % B, as
            `repeat_time` has it.
        scale: of the scores; None is D ** -0.5.

    Returns:
        (r * B, H, S, D), with (r * B, S, H, D) in memory.

    Raises:
        ValueError: shapes or dtypes do not fit, or the batch of q is no multiple of that of k.
    """
    images = k.shape[0]
    fits = q.dim() == k.dim() == 4 and k.shape == v.shape and q.shape[1] == k.shape[1]
    if (
        not fits
        or q.shape[3] != k.shape[3]
        or q.shape[0] % max(images, 1)
        or not (images or not q.shape[0])
    ):
        raise ValueError(
            "cross_attention: q must be (r * B, H, S, D), k and v (B, H, N, D), got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"cross_attention: q, k and v must have one dtype, got {q.dtype}, {k.dtype} and "
            f"{v.dtype}"
        )
    saves = needs_gradient(q, k, v)
    return _cross_attention(q, k, v, interleave, scale_of(scale, q.shape[-1]), saves)[0]
