"""Softmax attention under the masks of QLLaMA, which are never a tensor of S x T on a GPU.

    out = softmax(scale * q k^T over the keys that the row may attend to) v

fp32 softmax and sums; probabilities are rounded once to the input's dtype before they meet v, and
scores never are, which is more accurate than the published model (it rounds them twice). Source:
LlamaAttention and LlamaCrossAttention in OpenGVLab/InternVL, modeling_qllama.py, and the three
masks; the online softmax is FlashAttention-2's (arXiv 2307.08691), the split over keys
FlashDecoding's.

The masks are compile-time cases of one kernel (`full`, `causal`, `prefix`, `block`), each an
interval of keys per row, so blocks of keys outside it are not visited; padding is
`key_padding_mask`, a bool a key. A row that sees nothing attends to every key alike, as the
published clamp of its scores has it; its gradient is that of the same average.

Several rows of the batch may share keys and values, and several heads of a row: training repeats
the batch r times (`repeat_time`), beam search repeats every image, language models have fewer key
heads than query heads. Shared keys are read in place for all their queries, never copied, and their
gradients are summed inside the kernel, in a fixed order.

q is (r * B, H, S, D), k and v (B, Hk, T, D): H = Hk = 32, D = 128; S = T = 96 to 176 in QLLaMA's
self-attention, S = 96 and T = 257 to 1025 in its cross-attention. Bound by operations: 4 B H S T D
forward and 2.5 times that backward, of what the mask lets through; at batch 1 by latency, where the
keys are split so that the GPU fills.
"""

from functools import lru_cache

import torch
from torch import Tensor

from internvl_engine import reference

from ._attention import (
    FLASH,
    FLASH_BACKWARD,
    Attended,
    AttentionGradients,
    as_projected,
    check_padding,
    divides,
    empty_output,
    flash_serves,
    gradients_as_projected,
    log_sum_exp,
    needs_gradient,
    pack_queries,
    scale_of,
    unpack_queries,
)
from ._attention_cpu import attention_native, bmm_backward, sdpa_cpu
from ._autograd import vjp
from ._heads import lse_dtype
from ._library import define, triton_launcher


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: str, prefix: int, key_padding_mask: Tensor | None,
    scale: float, interleave: bool, saves: bool,
) -> Attended:  # fmt: skip
    """The reference with the log-sum-exp that another backend's gradient would need."""
    if q.numel() == 0 or k.shape[2] == 0:
        out, lse = empty_output(q, saves)
        return Attended(out.zero_(), lse.fill_(float("-inf")))
    out = as_projected(
        reference.attention(q, k, v, mask, prefix, key_padding_mask, scale, interleave)
    )
    if not saves:
        return Attended(out, empty_output(q, False).lse)
    k = reference.repeat_heads(reference.repeat_batch(k, q.shape[0], interleave), q.shape[1])
    if key_padding_mask is not None:
        key_padding_mask = reference.repeat_batch(key_padding_mask, q.shape[0], interleave)
    seen = reference.attention_mask(
        mask, q.shape[2], k.shape[2], prefix, key_padding_mask, q.device
    )
    return Attended(out, log_sum_exp(q, k, seen, scale))


@lru_cache(maxsize=32)
def _small_bias(mask: str, queries: int, keys: int, prefix: int, dtype: torch.dtype) -> Tensor:
    seen = reference.attention_mask(mask, queries, keys, prefix, None, "cpu")[0]
    return seen.new_zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))


def _bias(
    q: Tensor, keys: int, mask: str, prefix: int, key_padding_mask: Tensor | None
) -> Tensor | None:
    """What is added to the scores, (1 or B, 1, S, T); None for nothing.

    Masks up to 1024 x 1024 are built once. NotImplemented where a row sees nothing.
    """
    queries, bias = q.shape[2], None
    if mask != "full":
        build = _small_bias if queries * keys <= 1 << 20 else _small_bias.__wrapped__
        bias = build(mask, queries, keys, prefix, q.dtype)[None]
    if key_padding_mask is None:
        return bias
    padding = q.new_zeros(key_padding_mask.shape).masked_fill_(~key_padding_mask, float("-inf"))
    padding = padding[:, None, None, :]
    bias = padding.expand(-1, 1, queries, -1) if bias is None else bias + padding
    return NotImplemented if (bias.amax(-1) < 0).any() else bias


def attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: str, prefix: int, key_padding_mask: Tensor | None,
    scale: float, interleave: bool, saves: bool,
) -> Attended:  # fmt: skip
    """PyTorch's blocked attention on the CPU, the rows that share keys below each other."""
    if q.numel() == 0:
        return NotImplemented
    bias = _bias(q, k.shape[2], mask, prefix, key_padding_mask)
    if bias is NotImplemented:
        return NotImplemented
    packed = pack_queries(q, k, interleave)
    if bias is not None and packed is not q:
        bias = bias.repeat(1, 1, packed.shape[2] // q.shape[2], 1)
    found = sdpa_cpu(packed, k, v, bias, scale)
    if found is NotImplemented:
        return NotImplemented
    out, lse = (unpack_queries(x, q, k, interleave) for x in found)
    lse = lse.to(lse_dtype(q.dtype)).contiguous()
    return Attended(as_projected(out), lse if saves else lse.new_empty(0))


def attention_backward_bmm(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: str, prefix: int,
    key_padding_mask: Tensor | None, scale: float, interleave: bool,
) -> AttentionGradients:  # fmt: skip
    """The gradient on the CPU, the rows that share keys below each other."""
    if q.numel() == 0 or k.numel() == 0:
        return NotImplemented
    bias = _bias(q, k.shape[2], mask, prefix, key_padding_mask)
    if bias is NotImplemented:
        return NotImplemented
    grad, packed = (pack_queries(x, k, interleave) for x in (grad, q))
    found = bmm_backward(grad, packed, k, v, bias, scale)
    return found._replace(q=as_projected(unpack_queries(found.q, q, k, interleave)))


def _flash_backend(attend):
    def run(q, k, v, mask, prefix, key_padding_mask, scale, interleave, saves):
        causal = mask == "causal" and q.shape == k.shape
        if not (flash_serves(q) and key_padding_mask is None and (mask == "full" or causal)):
            return NotImplemented
        found = attend(pack_queries(q, k, interleave), k, v, causal, scale)
        out, lse = (unpack_queries(x, q, k, interleave) for x in found)
        return Attended(as_projected(out), lse.contiguous() if saves else lse.new_empty(0))

    return run


def _flash_backward_backend(differentiate):
    def run(grad, q, k, v, out, lse, mask, prefix, key_padding_mask, scale, interleave):
        causal = mask == "causal" and q.shape == k.shape
        if not (flash_serves(q) and key_padding_mask is None and (mask == "full" or causal)):
            return NotImplemented
        packed = (pack_queries(x, k, interleave) for x in (grad, q, out, lse.unsqueeze(-1)))
        grad, rows, out, lse = packed
        found = differentiate(grad, rows, k, v, out, lse.squeeze(-1).contiguous(), causal, scale)
        dq = unpack_queries(found.q, q, k, interleave)
        return gradients_as_projected((dq, found.k, found.v))

    return run


def _backward_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: str, prefix: int,
    key_padding_mask: Tensor | None, scale: float, interleave: bool,
) -> AttentionGradients:  # fmt: skip
    if q.numel() == 0 or k.shape[2] == 0:
        return gradients_as_projected(torch.zeros_like(x) for x in (q, k, v))
    args = (q, k, v, mask, prefix, key_padding_mask, scale, interleave)
    return gradients_as_projected(vjp(reference.attention, args, (0, 1, 2), (grad,)))


def _save(ctx, inputs: tuple, output: Attended) -> None:
    q, k, v, ctx.mask, ctx.prefix, key_padding_mask, ctx.scale, ctx.interleave, saves = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, key_padding_mask, *((out, lse) if saves else ()))


def _backward(ctx, grad: Tensor, _) -> tuple:
    q, k, v, key_padding_mask, *saved = ctx.saved_tensors
    rest = ctx.mask, ctx.prefix, key_padding_mask, ctx.scale, ctx.interleave
    if not saved:  # the caller did not expect a gradient, as inside torch.func's transforms
        saved = _attention(q, k, v, *rest, True)
    return *_attention_backward(grad, q, k, v, *saved, *rest), *[None] * 6


_attention = define(
    "attention(Tensor q, Tensor k, Tensor v, str mask, int prefix, Tensor? key_padding_mask, "
    "float scale, bool interleave, bool saves) -> (Tensor, Tensor)",
    reference=attention_reference,
    fake=lambda q, k, v, mask, prefix, key_padding_mask, scale, interleave, saves: empty_output(
        q, saves
    ),
    cpu={"native": attention_native, "sdpa": attention_sdpa},
    cuda={
        "triton": triton_launcher("attention"),
        **{name: _flash_backend(attend) for name, attend in FLASH.items()},
    },
    backward=(_backward, _save),
    lower_in_autocast=True,
)

_attention_backward = define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "str mask, int prefix, Tensor? key_padding_mask, float scale, bool interleave) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=lambda grad, q, k, v, *rest: AttentionGradients(
        *(empty_output(x, False).out for x in (q, k, v))
    ),
    cpu={"bmm": attention_backward_bmm},
    cuda={
        "triton": triton_launcher("attention", "attention_backward_triton"),
        **{name: _flash_backward_backend(run) for name, run in FLASH_BACKWARD.items()},
    },
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: str = "full",
    prefix: int = 0,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    interleave: bool = False,
) -> Tensor:
    """Softmax attention under one of the model's masks, K and V shared by several rows or heads.

    Args:
        q: (r * B, H, S, D); the queries are the last S of the T positions. Any strides, but a head
            that is not contiguous along D is copied. D up to 128 for the kernels; float32, float16
            or bfloat16; float64 runs the reference.
        k, v: (B, Hk, T, D), the dtype of q. Hk divides H, and query head h reads key head
            h // (H / Hk).
        mask: "full", "causal", "prefix" (the first `prefix` positions see each other, later ones
            see them and are causal) or "block" (the two groups do not see each other).
        prefix: of the masks "prefix" and "block"; 96 query tokens in QLLaMA.
        key_padding_mask: (B, T) bool, True = may be attended, False = padding
            (torch.nn.MultiheadAttention has it the other way round). None: there is no padding.
        scale: of the scores; None is D ** -0.5.
        interleave: whether row i of q reads the keys of row i // r, as beams do, and not of i % B,
            as `repeat_time` has it.

    Returns:
        (r * B, H, S, D), with (r * B, S, H, D) in memory. A row that sees nothing is the mean of
        all v.

    Raises:
        ValueError: shapes or dtypes do not fit, mask is unknown, or it needs S <= T.
    """
    _check(q, k, v)
    _check_mask(q, k, mask, prefix, key_padding_mask)
    scale, saves = scale_of(scale, q.shape[-1]), needs_gradient(q, k, v)
    return _attention(q, k, v, mask, prefix, key_padding_mask, scale, interleave, saves)[0]


def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, interleave: bool = False, scale: float | None = None
) -> Tensor:
    """`attention` of every query to all keys: QLLaMA's queries to the vision tokens of their image.

    Args:
        q: (r * B, H, S, D), the queries of r rows an image.
        k, v: (B, Hk, T, D), of the image, the dtype of q.
        interleave: whether row i of q belongs to image i // r, and not to i % B.
        scale: of the scores; None is D ** -0.5.

    Returns:
        (r * B, H, S, D), with (r * B, S, H, D) in memory.

    Raises:
        ValueError: shapes or dtypes do not fit, or the batch of q is no multiple of that of k.
    """
    return attention(q, k, v, scale=scale, interleave=interleave)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = q.dim() == k.dim() == 4 and k.shape == v.shape
    if fits:
        (batch, heads, _, dim), (images, key_heads, _, key_dim) = q.shape, k.shape
        fits = dim == key_dim and divides(images, batch) and divides(key_heads, heads)
    if not fits:
        raise ValueError(
            "attention: q must be (r * B, H, S, D), k and v (B, Hk, T, D) with Hk a divisor of H, "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"attention: q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
        )


def _check_mask(
    q: Tensor, k: Tensor, mask: str, prefix: int, key_padding_mask: Tensor | None
) -> None:
    if mask not in reference.MASKS:
        raise ValueError(f"attention: mask must be one of {reference.MASKS}, got {mask!r}")
    if mask != "full" and (q.shape[2] > k.shape[2] or prefix < 0):
        raise ValueError(
            f"attention: mask {mask!r} needs no more queries than keys and prefix >= 0, got "
            f"{q.shape[2]} queries, {k.shape[2]} keys and prefix {prefix}"
        )
    if key_padding_mask is not None:
        check_padding("attention", key_padding_mask, k)
