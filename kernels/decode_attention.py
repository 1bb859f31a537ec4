"""One query per row against the KV cache: the attention of a decoding step.

    out_b = softmax(scale * q_b k_b^T over the keys that are valid and no padding) v_b

Rounding: fp32 up to the output. Source: LlamaAttention in OpenGVLab/InternVL, modeling_qllama.py,
with one position; the split over keys is FlashDecoding's (Dao, Haziza, Massa, Sizov 2023).

The caches are (B, Hk, T, D) views of preallocated storage, read in place up to each row's length;
what lies behind a length is never read. Bound by memory: 2 * sum(lengths) * Hk * D values. Batch 1
x 32 heads would fill a quarter of a GPU, so the T slots are split over several programs; how many
depends on T only, not on the lengths, which stay on the device: a CUDA graph can capture the call.
"""

import torch
from torch import Tensor

from internvl_engine import reference

from ._attention import as_projected, check_padding, divides, empty_output, scale_of
from ._heads import adjacent_pointer, as_int64, pointer
from ._library import NATIVE_TYPES, address, define, native, triton_launcher


def decode_attention_native(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None,
    key_padding_mask: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """Calls csrc/cpu/decode_attention.h."""
    dtype, heads, (B, key_heads, T, D) = NATIVE_TYPES.get(q.dtype), q.shape[1], k_cache.shape
    if dtype is None or q.numel() == 0 or T == 0:
        return NotImplemented
    (q, q_heads), (k_cache, keys), (v_cache, values) = map(adjacent_pointer, (q, k_cache, v_cache))
    out = q.new_empty((B, 1, heads, D)).transpose(1, 2)
    lengths = None if lengths is None else as_int64(lengths)
    key_padding_mask = None if key_padding_mask is None else key_padding_mask.contiguous()
    native.decode_attention(
        dtype, q_heads, keys, values, pointer(out), address(lengths),
        address(key_padding_mask), (B, heads, T, D), key_heads, scale,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def decode_attention_by_rows(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None,
    key_padding_mask: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """The reference on the CPU, over the valid slots of each row: the others may hold NaN, which
    no mask hides."""
    if k_cache.shape[2] == 0:
        return empty_output(q, False).out.zero_()
    out = empty_output(q, False).out
    every = [k_cache.shape[2]] * q.shape[0]
    for row, length in enumerate(every if lengths is None else lengths.tolist()):
        if not 1 <= length <= k_cache.shape[2]:  # as csrc/cpu/decode_attention.h says it
            raise IndexError(
                f"decode_attention: length {length} is outside [1, {k_cache.shape[2]}]"
            )
        one = slice(row, row + 1)
        bias = None
        if key_padding_mask is not None:
            bias = reference.additive_mask(key_padding_mask[one, None, None, :length], q.dtype)
        k, v = (reference.repeat_heads(x[one, :, :length], q.shape[1]) for x in (k_cache, v_cache))
        out[one] = reference.masked_attention(q[one], k, v, bias, scale)[0]
    return out


def decode_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None,
    key_padding_mask: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """The reference, with the output as the kernels lay it out."""
    if k_cache.shape[2] == 0:
        return empty_output(q, False).out.zero_()
    found = reference.decode_attention(q, k_cache, v_cache, lengths, key_padding_mask, scale)
    return as_projected(found)


_decode_attention = define(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? lengths, "
    "Tensor? key_padding_mask, float scale) -> Tensor",
    reference=decode_attention_reference,
    fake=lambda q, *rest: empty_output(q, False).out,
    cpu={"native": decode_attention_native, "reference": decode_attention_by_rows},
    cuda={"triton": triton_launcher("decode_attention")},
    lower_in_autocast=True,
)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of one new position per row to the keys in the cache.

    Args:
        q: (B, H, 1, D). D up to 128 for the kernels; float32, float16 or bfloat16; float64 runs the
            reference.
        k_cache, v_cache: (B, Hk, T, D), the dtype of q, any strides with D contiguous. Row b holds
            lengths[b] keys, the new one included. Hk divides H, and query head h reads key head
            h // (H / Hk).
        lengths: (B,) integers from 1 to T, on the device of q and never read by the host on a GPU.
            None: every row holds T keys.
        key_padding_mask: (B, T) bool, True = may be attended, False = padding
            (torch.nn.MultiheadAttention has it the other way round). Every row must have a key
            that it may attend to: what a row without one gives is not defined.
        scale: of the scores; None is D ** -0.5.

    Returns:
        (B, H, 1, D), contiguous.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    fits = q.dim() == k_cache.dim() == 4 and v_cache.shape == k_cache.shape
    if fits:
        (batch, heads, queries, dim), (B, key_heads, _, D) = q.shape, k_cache.shape
        fits = (batch, queries, dim) == (B, 1, D) and divides(key_heads, heads)
    if not fits:
        raise ValueError(
            "decode_attention: q must be (B, H, 1, D), the caches (B, Hk, T, D) with Hk a divisor "
            f"of H, got {tuple(q.shape)}, {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(
            f"decode_attention: q and the caches must have one dtype, got {q.dtype}, "
            f"{k_cache.dtype} and {v_cache.dtype}"
        )
    if lengths is not None and (lengths.shape != (B,) or lengths.is_floating_point()):
        raise ValueError(
            f"decode_attention: lengths must be integers of shape ({B},), got {lengths.dtype} of "
            f"shape {tuple(lengths.shape)}"
        )
    if key_padding_mask is not None:
        check_padding("decode_attention", key_padding_mask, k_cache)
    scale = scale_of(scale, D)
    return _decode_attention(q, k_cache, v_cache, lengths, key_padding_mask, scale)
