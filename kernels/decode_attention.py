"""One query per row against the KV cache: the attention of a decoding step.

    out_b = softmax(scale * q_b k_b^T over the keys that are valid and visible) v_b

Rounding: fp32 up to the output. Source: LlamaAttention in OpenGVLab/InternVL, modeling_qllama.py,
with one position; the split over keys is FlashDecoding's (Dao, Haziza, Massa, Sizov 2023).

The caches are (B, H, T, D) views of preallocated storage, read in place up to each row's length;
what lies behind a length is never read. Bound by memory: 2 * sum(lengths) * H * D values. Batch 1 x
32 heads would fill a quarter of a GPU, so the T slots are split over several programs; how many
depends on T only, not on the lengths, which stay on the device: a CUDA graph can capture the call.
"""

import torch
from torch import Tensor

from internvl_engine import reference

from ._attention import as_projected, empty_output, scale_of
from ._heads import adjacent, as_int64, pointer
from ._library import NATIVE_TYPES, address, define, native, triton_launcher


def decode_attention_native(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None, visible: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    """Calls csrc/cpu/decode_attention.h."""
    dtype, (B, H, T, D) = NATIVE_TYPES.get(q.dtype), k_cache.shape
    if dtype is None or q.numel() == 0 or T == 0:
        return NotImplemented
    q, k_cache, v_cache = adjacent(q), adjacent(k_cache), adjacent(v_cache)
    out, lengths = empty_output(q, False)[0], None if lengths is None else as_int64(lengths)
    visible = None if visible is None else visible.contiguous()
    native.decode_attention(
        dtype, pointer(q), pointer(k_cache), pointer(v_cache), pointer(out), address(lengths),
        address(visible), (B, H, T, D), scale, torch.get_num_threads(),
    )  # fmt: skip
    return out


def decode_attention_by_rows(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None, visible: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    """The reference on the CPU, over the valid slots of each row: the others may hold NaN, which
    no mask hides."""
    if k_cache.shape[2] == 0:
        return empty_output(q, False)[0].zero_()
    out = empty_output(q, False)[0]
    every = [k_cache.shape[2]] * q.shape[0]
    for row, length in enumerate(every if lengths is None else lengths.tolist()):
        one = slice(row, row + 1)
        bias = None
        if visible is not None:
            bias = reference.additive_mask(visible[one, None, None, :length], q.dtype)
        k, v = k_cache[one, :, :length], v_cache[one, :, :length]
        out[one] = reference.masked_attention(q[one], k, v, bias, scale)[0]
    return out


def decode_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None, visible: Tensor | None,
    scale: float,
) -> Tensor:  # fmt: skip
    """The reference, with the output as the kernels lay it out."""
    if k_cache.shape[2] == 0:
        return empty_output(q, False)[0].zero_()
    found = reference.decode_attention(q, k_cache, v_cache, lengths, visible, scale)
    return as_projected(found)


_decode_attention = define(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? lengths, Tensor? visible, "
    "float scale) -> Tensor",
    reference=decode_attention_reference,
    fake=lambda q, *rest: empty_output(q, False)[0],
    cpu={"native": decode_attention_native, "reference": decode_attention_by_rows},
    cuda={"triton": triton_launcher("decode_attention")},
    lower_in_autocast=True,
)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | None = None,
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
            None: every row holds T keys.
        visible: (B, T) bool; False where a key is padding. Every row must see at least one key:
            what a row without one gives is not defined.
        scale: of the scores; None is D ** -0.5.

    Returns:
        (B, H, 1, D), contiguous.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if (
        q.dim() != 4
        or k_cache.dim() != 4
        or q.shape[2] != 1
        or q.shape[:2] != k_cache.shape[:2]
        or q.shape[3] != k_cache.shape[3]
        or v_cache.shape != k_cache.shape
    ):
        raise ValueError(
            "decode_attention: q must be (B, H, 1, D), the caches (B, H, T, D), got "
            f"{tuple(q.shape)}, {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(
            f"decode_attention: q and the caches must have one dtype, got {q.dtype}, "
            f"{k_cache.dtype} and {v_cache.dtype}"
        )
    B, _, T, D = k_cache.shape
    if lengths is not None and (lengths.shape != (B,) or lengths.is_floating_point()):
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
