"""InternViT's attention with its QK-norm, forward and backward, at the model's shapes.

"SDPA, no norms" is PyTorch's attention on q and k that are normed already, by each backend that it
has: what the norms cost is the difference to the fastest. FlexAttention gets the same algebra as
our kernel: q folded, and a score_mod that multiplies the columns by the keys' statistics.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from internvl_engine import reference
from internvl_engine.kernels import qk_norm_attention

from .cases import Case, Provider, backward, compile_anew, forward, gradient_of, rival

EPS = 1e-6
HEADS, DIM = 25, 128
# (images, tokens): 224 px, 448 px, and 378 px of the later checkpoints.
SHAPES = {
    "cpu": {"vision 224 px x 4": (4, 257), "vision 448 px": (1, 1025)},
    "cuda": {
        "vision 224 px": (1, 257), "vision 224 px x 64": (64, 257), "vision 378 px x 16": (16, 577),
        "vision 448 px x 16": (16, 1025),
    },
}  # fmt: skip
SDPA = {
    "cpu": {"SDPA, no norms": SDPBackend.FLASH_ATTENTION},
    "cuda": {
        "SDPA flash, no norms": SDPBackend.FLASH_ATTENTION,
        "SDPA cuDNN, no norms": SDPBackend.CUDNN_ATTENTION,
    },
}


def cases(device: str) -> Iterator[Case]:
    for label, (images, tokens) in SHAPES[device].items():
        qkv = torch.randn(images, tokens, 3, HEADS, DIM, dtype=torch.bfloat16, device=device)
        weights = [(torch.rand(HEADS * DIM, device=device) + 0.5).to(qkv.dtype) for _ in range(2)]
        for direction in (forward, backward):
            yield _case(label, direction, qkv, *weights)


def _case(label: str, direction: Callable, *args: Tensor) -> Case:
    """Forward reads q, k and v and writes out; backward reads those four and its gradient and
    writes three. Two and five products of 2 B N**2 H D operations.
    """
    qkv = args[0]
    on_cpu = qkv.device.type == "cpu"
    # FlexAttention has no gradient on a CPU.
    others = {} if on_cpu and direction is backward else {"FlexAttention": flex()}
    providers = direction("qk_norm_attention", fused, eager, *args, others=others)
    providers |= sdpa_of_normed(direction is forward, *args)
    parts, products = (4, 2) if direction is forward else (8, 5)
    size = qkv.numel() // 3
    traffic, flops = parts * size * qkv.element_size(), products * 2 * size * qkv.shape[1]
    label = f"{label}, {direction.__name__}"
    return Case("qk_norm_attention", label, tuple(qkv.shape), qkv.dtype, providers, traffic, flops)


def fused(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
    return qk_norm_attention(qkv, q_weight, k_weight, EPS)


def eager(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
    return reference.qk_norm_attention(qkv, q_weight, k_weight, EPS)


def sdpa_of_normed(is_forward: bool, *args: Tensor) -> dict[str, Provider]:
    """PyTorch's attention alone; its gradient is of the normed q and k, so not the same."""
    heads = normed(*args)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    found: dict[str, Provider] = {}
    for name, backend in SDPA[args[0].device.type].items():
        run = partial(attend, *heads) if is_forward else gradient_of(attend, *heads)
        found |= rival(name, run, partial(sdpa_kernel, backend), same=is_forward)
    return found


def normed(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> list[Tensor]:
    """q, k, v (B, H, N, D) with the norms applied, as F.scaled_dot_product_attention takes them."""
    q, k, v = qkv.unbind(2)
    q = reference.rms_norm(q.flatten(2), q_weight, EPS).view(q.shape)
    k = reference.rms_norm(k.flatten(2), k_weight, EPS).view(k.shape)
    return [x.transpose(1, 2) for x in (q, k, v)]


def flex() -> Callable:
    """FlexAttention with the norm folded in.

    Two compiled functions: as one, PyTorch 2.13 finds no kernel for the CPU.
    """
    from torch.nn.attention.flex_attention import flex_attention

    def fold(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, ...]:
        q, k, v = qkv.unbind(2)
        q_rstd, k_rstd = (torch.rsqrt(x.flatten(2).float().square().mean(-1) + EPS) for x in (q, k))
        weight = (q_weight.float() * k_weight.float()).view(q.shape[2:])
        q = (q.float() * q_rstd[..., None, None] * weight).to(qkv.dtype)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), k_rstd

    def attend(q: Tensor, k: Tensor, v: Tensor, k_rstd: Tensor) -> Tensor:
        def columns(score, b, h, i, j):
            return score * k_rstd[b, j]

        return flex_attention(q, k, v, score_mod=columns).transpose(1, 2)

    first, second = compile_anew(fold), compile_anew(attend)
    return lambda *args: second(*first(*args))
