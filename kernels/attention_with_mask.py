"""Softmax attention under a mask that is a tensor, as models of other libraries hand it on.

    out = softmax(scale * q k^T + mask) v            mask (B or 1, H or 1, S, T), bool or additive

Rounding is that of attention.py. transformers makes such masks of causality, padding, windows and
caches of fixed size; nearly all of them are one interval of keys a row with few holes. The native
kernel reads them so: keys before the first and behind the last one that a tile of queries sees are
not visited, and a single query goes to decode_attention with its row for a key padding mask.
Nothing is assumed about a mask, so none can be misread.

An additive mask says the same where every value is 0 or next to the lowest of its dtype, which one
pass finds out; with other values (biases) it is the reference's. A row that sees nothing attends to
every key alike. Source: eager_attention_forward and sdpa_attention_forward in transformers.

q is (B, H, S, D), k and v (B, Hk, T, D), of which H / Hk heads share one: S = T = 1300 at heads of
64 in the prefill of a small chat model, S = 1 behind it.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from internvl_engine import reference

from ._attention import (
    AttentionGradients,
    as_projected,
    divides,
    empty_output,
    gradients_as_projected,
    needs_gradient,
    pack_queries,
    scale_of,
    unpack_queries,
)
from ._attention_cpu import attention_native, bmm_backward, sdpa_cpu
from ._autograd import vjp
from ._heads import pointer
from ._library import NATIVE_TYPES, define, native
from .decode_attention import decode_attention_native


def seen_by(mask: Tensor) -> Tensor | None:
    """A mask as bool, True = may be attended, where it says no more than that; else None."""
    if mask.dtype == torch.bool:
        return mask if mask.stride(-1) == 1 else mask.contiguous()
    dtype = NATIVE_TYPES.get(mask.dtype)
    if dtype is None:
        return None
    shape = mask.shape
    once = tuple(slice(None if step else 1) for step in mask.stride()[:3])  # without its repeats
    mask = mask[once]
    mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    seen = torch.empty(mask.shape, dtype=torch.bool, device=mask.device)
    threads = torch.get_num_threads()
    if not native.read_mask(dtype, pointer(mask), pointer(seen), tuple(mask.shape), threads):
        return None
    return seen.expand(shape)


def attention_with_mask_native(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """csrc/cpu/attention.h, and decode_attention.h for a single query."""
    if NATIVE_TYPES.get(q.dtype) is None or q.numel() == 0 or k.numel() == 0:
        return NotImplemented
    if native.instruction_set() == "portable" or (seen := seen_by(mask)) is None:
        return NotImplemented
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    if queries == 1 and seen.shape[1] == 1:
        shown = seen[:, 0, 0].expand(batch, keys)
        if bool(shown.any(-1).all()):
            return decode_attention_native(q, k, v, None, shown, scale)
    seen = seen.expand(batch, heads, queries, keys)
    return attention_native(q, k, v, "full", 0, None, scale, False, False, seen=seen)[0]


def attention_with_mask_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """PyTorch's blocked attention on the CPU, in float32; in bfloat16 the reference is faster."""
    if q.dtype != torch.float32 or mask.shape[1] != 1 or q.numel() == 0 or k.numel() == 0:
        return NotImplemented
    packed = pack_queries(q, k, False)
    bias = _bias(q, mask).repeat(1, 1, packed.shape[2] // q.shape[2], 1)
    found = sdpa_cpu(packed, k, v, bias, scale)
    return found if found is NotImplemented else as_projected(unpack_queries(found[0], q, k, False))


def attention_with_mask_cuda(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """PyTorch's fused attention, which takes a mask with as many key heads as query heads only."""
    k, v = (reference.repeat_heads(x, q.shape[1]) for x in (k, v))
    return as_projected(scaled_dot_product_attention(q, k, v, _bias(q, mask), scale=scale))


def _bias(q: Tensor, mask: Tensor) -> Tensor:
    """The mask as what is added to the scores: finite, so that a row that sees nothing is the mean
    of all values, and so low that nothing of a hidden key is left."""
    lowest = torch.finfo(q.dtype).min / 2
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, lowest)
    return mask.to(q.dtype).clamp(min=lowest)


def attention_with_mask_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """The reference, with the output as the kernels lay it out."""
    if q.numel() == 0 or k.shape[2] == 0:
        return empty_output(q, False).out.zero_()
    return as_projected(reference.attention_with_mask(q, k, v, mask, scale))


def attention_with_mask_backward_bmm(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float
) -> AttentionGradients:
    """The gradient on the CPU, the heads that share keys below each other."""
    if q.numel() == 0 or k.numel() == 0 or mask.shape[1] != 1:
        return NotImplemented
    grad, packed = (pack_queries(x, k, False) for x in (grad, q))
    found = bmm_backward(grad, packed, k, v, _bias(q, mask), scale)
    return found._replace(q=as_projected(unpack_queries(found.q, q, k, False)))


def _backward_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float
) -> AttentionGradients:
    if q.numel() == 0 or k.shape[2] == 0:
        return gradients_as_projected(torch.zeros_like(x) for x in (q, k, v))
    args = (q, k, v, mask, scale)
    return gradients_as_projected(vjp(reference.attention_with_mask, args, (0, 1, 2), (grad,)))


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor) -> tuple:
    return *_attention_with_mask_backward(grad, *ctx.saved_tensors, ctx.scale), None, None


_attention_with_mask = define(
    "attention_with_mask(Tensor q, Tensor k, Tensor v, Tensor mask, float scale) -> Tensor",
    reference=attention_with_mask_reference,
    fake=lambda q, *rest: empty_output(q, False).out,
    cpu={"native": attention_with_mask_native, "sdpa": attention_with_mask_sdpa},
    cuda={"sdpa": attention_with_mask_cuda},
    backward=(_backward, _save),
    lower_in_autocast=True,
)

_attention_with_mask_backward = define(
    "attention_with_mask_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor mask, "
    "float scale) -> (Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=lambda grad, q, k, v, *rest: AttentionGradients(
        *(empty_output(x, False).out for x in (q, k, v))
    ),
    cpu={"bmm": attention_with_mask_backward_bmm},
)


def attention_with_mask(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None
) -> Tensor:
    """Softmax attention under a boolean or additive mask, key heads shared by several query heads.

    Args:
        q: (B, H, S, D), any strides. D up to 128 for the kernels; float32, float16 or bfloat16;
            float64 runs the reference.
        k, v: (B, Hk, T, D), the dtype of q. Hk divides H, and query head h reads key head
            h // (H / Hk).
        mask: (B or 1, H or 1, S or 1, T), bool with True = may be attended, or floating and added
            to the scores; no gradient.
        scale: of the scores; None is D ** -0.5.

    Returns:
        (B, H, S, D), with (B, S, H, D) in memory. A row that sees nothing is the mean of all v.

    Raises:
        ValueError: shapes or dtypes do not fit, or the mask requires a gradient.
    """
    if mask.dim() == 4 and mask.shape[2] == 1:
        mask = mask.expand(-1, -1, q.shape[-2], -1)
    _check(q, k, v, mask)
    scale = scale_of(scale, q.shape[-1])
    if needs_gradient(mask):
        raise ValueError("attention_with_mask: the mask has no gradient; detach it")
    return _attention_with_mask(q, k, v, mask, scale)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> None:
    fits = q.dim() == k.dim() == mask.dim() == 4 and k.shape == v.shape
    if fits:
        (batch, heads, queries, dim), (rows, key_heads, keys, key_dim) = q.shape, k.shape
        fits = (batch, dim) == (rows, key_dim) and divides(key_heads, heads)
        fits = fits and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
        fits = fits and mask.shape[2:] == (queries, keys)
    if not fits:
        raise ValueError(
            "attention_with_mask: q must be (B, H, S, D), k and v (B, Hk, T, D) with Hk a divisor "
            f"of H, mask (B or 1, H or 1, S, T), got {tuple(q.shape)}, {tuple(k.shape)}, "
            f"{tuple(v.shape)} and {tuple(mask.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"attention_with_mask: q, k and v must have one dtype, got {q.dtype}, {k.dtype} and "
            f"{v.dtype}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"attention_with_mask: mask must be bool or floating, got {mask.dtype}")
