"""QLLaMA's self-attention in its modes, with masks that are never a tensor of S x T on a GPU.

    out = softmax(scale * q k^T over the keys that the row sees) v

fp32 softmax and sums; probabilities are rounded once to the input's dtype before they meet v, and
scores never are, which is more accurate than the published model (it rounds them twice). Source:
LlamaAttention in OpenGVLab/InternVL, modeling_qllama.py, and its three masks; the online softmax is
FlashAttention-2's (arXiv 2307.08691).

The masks are compile-time cases of one kernel (`full`, `causal`, `prefix`, `block`), each an
interval of keys per row, so blocks of keys outside it are not visited; padding is `visible`, a bool
a key. A row that sees nothing attends to every key alike, as the published clamp of its scores has
it; its gradient is that of the same average.

q is (B, H, S, D), k and v (B, H, T, D): H = 32, D = 128, S = T = 96 to 176 in QLLaMA. Bound by
operations: 4 B H S T D forward and 2.5 times that backward, of what the mask lets through.
"""

from functools import lru_cache

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


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: str, prefix: int, visible: Tensor | None, scale: float,
    saves: bool,
) -> Pair:  # fmt: skip
    """The reference with the log-sum-exp that another backend's gradient would need."""
    if k.shape[2] == 0:
        out, lse = empty_output(q, saves)
        return out.zero_(), lse.fill_(float("-inf"))
    out = as_projected(reference.attention(q, k, v, mask, prefix, visible, scale))
    if not saves:
        return out, empty_output(q, False)[1]
    seen = reference.attention_mask(mask, q.shape[2], k.shape[2], prefix, visible, q.device)
    return out, log_sum_exp(q, k, seen, scale)


@lru_cache(maxsize=32)
def _small_bias(mask: str, queries: int, keys: int, prefix: int, dtype: torch.dtype) -> Tensor:
    seen = reference.attention_mask(mask, queries, keys, prefix, None)[0]
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))


def _bias(q: Tensor, keys: int, mask: str, prefix: int, visible: Tensor | None) -> Tensor | None:
    """What is added to the scores, (1 or B, 1, S, T); None for nothing.

    Masks up to 1024 x 1024 are built once. NotImplemented where a row sees nothing.
    """
    queries, bias = q.shape[2], None
    if mask != "full":
        build = _small_bias if queries * keys <= 1 << 20 else _small_bias.__wrapped__
        bias = build(mask, queries, keys, prefix, q.dtype)[None]
    if visible is None:
        return bias
    padding = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, float("-inf"))
    padding = padding[:, None, None, :]
    bias = padding.expand(-1, 1, queries, -1) if bias is None else bias + padding
    return NotImplemented if (bias.amax(-1) < 0).any() else bias


def attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: str, prefix: int, visible: Tensor | None, scale: float,
    saves: bool,
) -> Pair:  # fmt: skip
    """PyTorch's blocked attention on the CPU."""
    bias = _bias(q, k.shape[2], mask, prefix, visible)
    found = NotImplemented if bias is NotImplemented else sdpa_cpu(q, k, v, bias, scale)
    if found is NotImplemented:
        return NotImplemented
    lse = found[1].to(lse_dtype(q.dtype)).contiguous()
    return as_projected(found[0]), lse if saves else lse.new_empty(0)


def attention_backward_bmm(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: str, prefix: int,
    visible: Tensor | None, scale: float,
) -> Three:  # fmt: skip
    """The gradient on the CPU."""
    if q.numel() == 0 or k.numel() == 0:
        return NotImplemented
    bias = _bias(q, k.shape[2], mask, prefix, visible)
    return NotImplemented if bias is NotImplemented else bmm_backward(grad, q, k, v, bias, scale)


def _flash_backend(attend):
    def run(q, k, v, mask, prefix, visible, scale, saves):
        causal = mask == "causal" and q.shape[2] == k.shape[2]
        if not (flash_serves(q) and visible is None and (mask == "full" or causal)):
            return NotImplemented
        out, lse = attend(q, k, v, causal, scale)
        return out, lse.contiguous() if saves else lse.new_empty(0)

    return run


def _backward_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: str, prefix: int,
    visible: Tensor | None, scale: float,
) -> Three:  # fmt: skip
    if k.shape[2] == 0:
        return all_as_projected(torch.zeros_like(x) for x in (q, k, v))

    def attend(q, k, v):
        return reference.attention(q, k, v, mask, prefix, visible, scale)

    return all_as_projected(gradient(attend, wanted=(0, 1, 2))(grad, q, k, v))


def _save(ctx, inputs: tuple, output: Pair) -> None:
    q, k, v, ctx.mask, ctx.prefix, visible, ctx.scale, saves = inputs
    assert saves or not q.requires_grad, "called for a gradient with saves=False"
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, visible)


def _backward(ctx, grad: Tensor, _) -> tuple:
    *tensors, visible = ctx.saved_tensors
    grads = _attention_backward(grad, *tensors, ctx.mask, ctx.prefix, visible, ctx.scale)
    return *grads, None, None, None, None, None


_attention = define(
    "attention(Tensor q, Tensor k, Tensor v, str mask, int prefix, Tensor? visible, float scale, "
    "bool saves) -> (Tensor, Tensor)",
    reference=attention_reference,
    fake=lambda q, k, v, mask, prefix, visible, scale, saves: empty_output(q, saves),
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
    "str mask, int prefix, Tensor? visible, float scale) -> (Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=lambda grad, q, k, v, *rest: tuple(empty_output(x, False)[0] for x in (q, k, v)),
    cpu={"bmm": attention_backward_bmm},
    cuda={"triton": triton_launcher("attention", "attention_backward_triton")},
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: str = "full",
    prefix: int = 0,
    visible: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention under one of the model's masks.

    Args:
        q: (B, H, S, D); the queries are the last S of the T positions. Any strides, but a head
            that is not contiguous along D is copied. D up to 128 for the kernels; float32, float16
            or bfloat16; float64 runs the reference.
        k, v: (B, H, T, D), the dtype of q.
        mask: "full", "causal", "prefix" (the first `prefix` positions see each other, later ones
            see them and are causal) or "block" (the two groups do not see each other).
        prefix: of the masks "prefix" and "block"; 96 query tokens in QLLaMA.
        visible: (B, T) bool; False where a key is padding that nobody sees. None: all are seen.
        scale: of the scores; None is D ** -0.5.

    Returns:
        (B, H, S, D), with (B, S, H, D) in memory. A row that sees nothing is the mean of all v.

    Raises:
        ValueError: shapes or dtypes do not fit, mask is unknown, or it needs S <= T.
    """
    _check(q, k, v, mask, prefix, visible)
    saves = needs_gradient(q, k, v)
    return _attention(q, k, v, mask, prefix, visible, scale_of(scale, q.shape[-1]), saves)[0]


def _check(q: Tensor, k: Tensor, v: Tensor, mask: str, prefix: int, visible: Tensor | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or _heads(q) != _heads(k):
        raise ValueError(
            "attention: q must be (B, H, S, D), k and v (B, H, T, D), got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"attention: q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if mask not in reference.MASKS:
        raise ValueError(f"attention: mask must be one of {reference.MASKS}, got {mask!r}")
    if mask != "full" and (q.shape[2] > k.shape[2] or prefix < 0):
        raise ValueError(
            f"attention: mask {mask!r} needs no more queries than keys and prefix >= 0, got "
            f"{q.shape[2]} queries, {k.shape[2]} keys and prefix {prefix}"
        )
    if visible is not None and (
        visible.dtype != torch.bool or visible.shape != (k.shape[0], k.shape[2])
    ):
        raise ValueError(
            f"attention: visible must be bool of shape {(k.shape[0], k.shape[2])}, got "
            f"{visible.dtype} of shape {tuple(visible.shape)}"
        )


def _heads(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x.shape[3]
