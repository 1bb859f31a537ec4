"""What the attention operators share outside Triton and the CPU: layouts, and others' attentions.

PyTorch's and flash-attn's take q (B, H, S, D), k and v (B, H, T, D) in any strides. The
log-sum-exps that gradients start from are natural ones.
"""

from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from ._heads import lse_dtype


class Attended(NamedTuple):
    """out (B, H, S, D), with (B, S, H, D) in memory, and its log-sum-exp (B, H, S) or nothing."""

    out: Tensor
    lse: Tensor


class AttentionGradients(NamedTuple):
    """Of the loss by q, k and v, each with (B, S, H, D) in memory."""

    q: Tensor
    k: Tensor
    v: Tensor


def empty_output(q: Tensor, saves: bool) -> Attended:
    """For q (B, H, S, D), not written; no lse where no gradient will need it."""
    B, H, S, D = q.shape
    lse = q.new_empty((B, H, S) if saves else 0, dtype=lse_dtype(q.dtype))
    return Attended(q.new_empty((B, S, H, D)).transpose(1, 2), lse)


def as_projected(x: Tensor) -> Tensor:
    """x (B, H, S, D) with (B, S, H, D) in memory; a copy only where it is not yet so."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def gradients_as_projected(tensors: Iterable[Tensor]) -> AttentionGradients:
    """as_projected of each of the three."""
    return AttentionGradients(*(as_projected(x) for x in tensors))


def pack_queries(q: Tensor, k: Tensor, interleave: bool) -> Tensor:
    """q (r * B, H, S, D) as (B, Hk, r * G * S, D): all rows that read the same keys in one block.

    Rows are ordered by repeat, then by head of the group of G = H / Hk, then by position.
    """
    images, key_heads = k.shape[:2]
    if q.shape[:2] == (images, key_heads):
        return q
    q = q.unflatten(0, (images, -1)) if interleave else q.unflatten(0, (-1, images)).transpose(0, 1)
    return q.unflatten(2, (key_heads, -1)).transpose(1, 2).flatten(2, 4)


def unpack_queries(x: Tensor, q: Tensor, k: Tensor, interleave: bool) -> Tensor:
    """The inverse of pack_queries for x (B, Hk, r * G * S, ...): (r * B, H, S, ...)."""
    images, key_heads = k.shape[:2]
    if q.shape[:2] == (images, key_heads):
        return x
    blocks = q.shape[0] // images, q.shape[1] // key_heads, q.shape[2]
    x = x.unflatten(2, blocks).transpose(1, 2).flatten(2, 3)
    return (x if interleave else x.transpose(0, 1)).flatten(0, 1)


def log_sum_exp(q: Tensor, k: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """(B, H, S) of the scores of the keys seen; -infinity for a row that sees nothing."""
    wide = lse_dtype(q.dtype)
    scores = q.to(wide) @ k.to(wide).transpose(-2, -1) * scale
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.logsumexp(-1)


def divides(part: int, whole: int) -> bool:
    """Whether `whole` is a multiple of `part`; of 0 only 0 is."""
    return whole % part == 0 if part else whole == 0


def check_padding(operator: str, key_padding_mask: Tensor, k: Tensor) -> None:
    """Raises ValueError where the mask is not bool (B, T) for keys k (B, Hk, T, D)."""
    shape = (k.shape[0], k.shape[2])
    if key_padding_mask.dtype != torch.bool or key_padding_mask.shape != shape:
        raise ValueError(
            f"{operator}: key_padding_mask must be bool of shape {shape}, True = may be attended, "
            f"got {key_padding_mask.dtype} of shape {tuple(key_padding_mask.shape)}"
        )


def scale_of(scale: float | None, dim: int) -> float:
    """scale, or dim ** -0.5 for None.

    Raises:
        ValueError: scale is not positive; the online softmax takes maxima before it scales.
    """
    if scale is None:
        return dim**-0.5
    if not scale > 0:
        raise ValueError(f"attention: scale must be positive, got {scale}")
    return scale


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for the gradient of an operator on these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def flash_serves(q: Tensor) -> bool:
    """Whether the flash kernels take these heads."""
    sixteen_bits = q.dtype in (torch.float16, torch.bfloat16)
    return sixteen_bits and q.shape[-1] % 8 == 0 and q.numel() > 0


def torch_flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Attended:
    """FlashAttention-2 as PyTorch ships it, on CUDA."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention.default
    out, lse, *_ = attend(q, k, v, 0.0, causal, False, scale=scale)
    return Attended(as_projected(out), lse)


def torch_cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Attended:
    """cuDNN's attention through PyTorch."""
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    out, lse, *_ = attend(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return Attended(as_projected(out), lse.view(out.shape[:3]))


def flash_attn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Attended:
    """The flash-attn package in the version that is made for this GPU, of those installed."""
    attend, wants_lse = _flash_attn_of(q.device)
    rows = (x.transpose(1, 2) for x in (q, k, v))  # (B, S, H, D)
    out, lse, *_ = attend(*rows, softmax_scale=scale, causal=causal, **{wants_lse: True})
    return Attended(out.transpose(1, 2), lse)


@cache
def _flash_attn_of(device: torch.device) -> tuple[Callable, str]:
    """(flash_attn_func, its argument that asks for the log-sum-exp)."""
    versions = {  # 3 is made for Hopper, 4 for Blackwell
        3: ("flash_attn_interface", "return_attn_probs"),
        2: ("flash_attn", "return_attn_probs"),
        4: ("flash_attn.cute", "return_lse"),
    }
    blackwell = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10
    for version in (4, 3, 2) if blackwell else (3, 2, 4):
        name, wants_lse = versions[version]
        found = find_spec(name.split(".")[0]) and find_spec(name)
        attend = getattr(import_module(name), "flash_attn_func", None) if found else None
        if attend is not None:  # 4 alone leaves a package flash_attn without it
            return attend, wants_lse
    raise ImportError("flash-attn is installed without flash_attn_func; reinstall it")


# What CUDA can use beside Triton, by the names that prefer() takes.
FLASH = {"torch_flash": torch_flash, "cudnn": torch_cudnn}
if find_spec("flash_attn") or find_spec("flash_attn_interface"):
    FLASH["flash_attn"] = flash_attn


def torch_flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
    scale: float,
) -> AttentionGradients:  # fmt: skip
    """FlashAttention-2's gradient as PyTorch ships it, on CUDA; sums by atomics unless
    torch.use_deterministic_algorithms is on."""
    differentiate = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
    seed = q.new_empty(0, dtype=torch.int64)  # of dropout, which there is none of
    return AttentionGradients(
        *differentiate(
            grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, seed, seed,
            scale=scale,
        )
    )  # fmt: skip


def torch_cudnn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
    scale: float,
) -> AttentionGradients:  # fmt: skip
    """cuDNN's gradient through PyTorch: the fastest on Hopper, by its own figures."""
    differentiate = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
    seed = q.new_empty(0, dtype=torch.int64)  # of dropout, which there is none of
    return AttentionGradients(
        *differentiate(
            grad, q, k, v, out, lse.unsqueeze(-1), seed, seed, None, None, None, q.shape[2],
            k.shape[2], 0.0, causal, scale=scale,
        )
    )  # fmt: skip


FLASH_BACKWARD = {"torch_flash": torch_flash_backward, "cudnn": torch_cudnn_backward}
