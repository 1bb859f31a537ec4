"""One query per row against the KV cache: the attention of a decoding step.

    out_b = softmax(scale * q_b k_b^T over the keys that are valid and visible) v_b

Rounding: fp32 up to the output. Source: LlamaAttention in OpenGVLab/InternVL, modeling_qllama.py,
with one position; the split over keys is FlashDecoding's (Dao, Haziza, Massa, Sizov 2023).

The caches are (B, H, T, D) views of preallocated storage, read in place up to each row's length;
what lies behind a length is never read. Bound by memory: 2 * sum(lengths) * H * D values. Batch 1 x
32 heads would fill a quarter of a GPU, so the T slots are split over several programs; how many
depends on T only, not on the lengths, which stay on the device: a CUDA graph can capture the call.
"""

import math

import torch
from torch import Tensor

from internvl_engine import reference

from ._attention import as_projected, empty_output, scale_of, sdpa_cpu
from ._library import define, triton_launcher


def decode_attention_cpu(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, visible: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    """Two matrix products a row, over its valid slots in place: half the time of PyTorch's SDPA.

    What lies behind a length may be anything, NaN too, which no mask could hide.
    """
    if q.dtype == torch.float64 or q.numel() == 0 or k_cache.shape[2] == 0:
        return NotImplemented
    out = empty_output(q, False)[0]
    for row, length in enumerate(lengths.tolist()):
        k, v = k_cache[row, :, :length], v_cache[row, :, :length]
        bias = None
        if visible is not None:
            hidden = ~visible[row, :length]
            bias = torch.zeros(length, dtype=q.dtype).masked_fill_(hidden, -math.inf)
        if q.dtype != torch.float32:
            _two_products(q[row], k, v, bias, scale, out[row])
            continue
        one = slice(row, row + 1)  # in float32 the product below would round more than eager's
        bias = None if bias is None else bias[None, None, None]
        out[one] = sdpa_cpu(q[one], k[None], v[None], bias, False, scale)[0]
    return out


def _two_products(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, out: Tensor
) -> None:
    """One row: q (H, 1, D), k and v (H, L, D), bias (L,) to out (H, 1, D)."""
    scores = q.new_empty((k.shape[0], k.shape[1], 1))  # k @ q: 2.5 times as fast as q @ k.mT
    start, beta = (scores, 0) if bias is None else (bias[:, None], 1)
    torch.baddbmm(start, k, q.mT, beta=beta, alpha=scale, out=scores)
    torch.bmm(scores.softmax(1).mT, v, out=out)


def decode_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, visible: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    """The reference, with the output as the kernels lay it out."""
    if k_cache.shape[2] == 0:
        return empty_output(q, False)[0].zero_()
    found = reference.decode_attention(q, k_cache, v_cache, lengths, visible, scale)
    return as_projected(found)


_decode_attention = define(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? visible, "
    "float scale) -> Tensor",
    reference=decode_attention_reference,
    fake=lambda q, *rest: empty_output(q, False)[0],
    cpu={"bmm": decode_attention_cpu},
    cuda={"triton": triton_launcher("decode_attention")},
    lower_in_autocast=True,
)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    visible: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of one new position per row to the keys in the cache.

    Args:
        q: (B, H, 1, D). D up to 128 for the kernels; float32, float16 or bfloat16; float64 runs the
            reference.
        k_cache, v_cache: (B, H, T, D), the dtype of q, any strides with D contiguous. Row b holds
            lengths[b] keys, the new one included.
        lengths: (B,) integers from 1 to T, on the device of q and never read by the host on a GPU.
        visible: (B, T) bool; False where a key is padding. Every row must see at least one key:
            what a row without one gives is not defined.
        scale: of the scores; None is D ** -0.5.

    Returns:
        (B, H, 1, D), contiguous.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    B, H, S, D = q.shape
    T = k_cache.shape[2]
    if S != 1 or k_cache.shape != (B, H, T, D) or v_cache.shape != k_cache.shape:
        raise ValueError(
            "decode_attention: q must be (B, H, 1, D), the caches (B, H, T, D), got "
            f"{tuple(q.shape)}, {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(
            f"decode_attention: q and the caches must have one dtype, got {q.dtype}, "
            f"{k_cache.dtype} and {v_cache.dtype}"
        )
    if lengths.shape != (B,) or lengths.is_floating_point():
        raise ValueError(
            f"decode_attention: lengths must be integers of shape ({B},), got {lengths.dtype} of "
            f"shape {tuple(lengths.shape)}"
        )
    if visible is not None and (visible.dtype != torch.bool or visible.shape != (B, T)):
        raise ValueError(
            f"decode_attention: visible must be bool of shape ({B}, {T}), got {visible.dtype} of "
            f"shape {tuple(visible.shape)}"
        )
    scale = scale_of(scale, D)
    return _decode_attention(q, k_cache, v_cache, lengths, visible, scale)
