"""InternViT's attention with its QK-norm, forward and backward, at the model's shapes.

"SDPA, no norms" is PyTorch's attention on q and k that are normed already: what the norms cost is
the difference to it. FlexAttention gets the same algebra as our kernel: q folded, and a score_mod
that multiplies the columns by the keys' statistics.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_engine import reference
from internvl_engine.kernels import qk_norm_attention

from .bench_rms_norm import gradient_of
from .harness import Case, Provider, Run, compiled, ours

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


def cases(device: str) -> Iterator[Case]:
    for label, (images, tokens) in SHAPES[device].items():
        qkv = torch.randn(images, tokens, 3, HEADS, DIM, dtype=torch.bfloat16, device=device)
        weights = [(torch.rand(HEADS * DIM, device=device) + 0.5).to(qkv.dtype) for _ in range(2)]
        yield _forward(label, qkv, *weights)
        yield _backward(label, qkv, *weights)


def _forward(label: str, qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Case:
    def eager(qkv, q_weight, k_weight):
        return reference.qk_norm_attention(qkv, q_weight, k_weight, EPS)

    args = (qkv, q_weight, k_weight)
    providers: dict[str, Provider | Run] = {
        **ours("qk_norm_attention", lambda: qk_norm_attention(*args, EPS)),
        "eager": lambda: eager(*args),
        "SDPA, no norms": sdpa_of_normed(*args),
        **compiled(eager, *args),
        **flex(*args),
    }
    return _case(f"{label}, forward", qkv, providers, 4, 4)


def _backward(label: str, qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Case:
    def run(function: Callable) -> Run:
        return gradient_of(lambda *leaves: function(*leaves, EPS), qkv, q_weight, k_weight)

    providers: dict[str, Provider | Run] = {
        **ours("qk_norm_attention", run(qk_norm_attention)),
        "eager": run(reference.qk_norm_attention),
    }
    return _case(f"{label}, backward", qkv, providers, 10, 8)


def _case(
    label: str, qkv: Tensor, providers: dict[str, Provider | Run], products: int, parts: int
) -> Case:
    """`products` in multiples of B N**2 H D operations, `parts` in multiples of q's size."""
    B, N = qkv.shape[:2]
    width = HEADS * DIM
    traffic = parts * B * N * width * qkv.element_size()
    flops = products * B * N * N * width
    shape = tuple(qkv.shape)
    return Case("qk_norm_attention", label, shape, qkv.dtype, providers, traffic, flops)


def normed(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, N, D) with the norms applied, as F.scaled_dot_product_attention takes them."""
    q, k, v = qkv.unbind(2)
    q = reference.rms_norm(q.flatten(2), q_weight, EPS).view(q.shape)
    k = reference.rms_norm(k.flatten(2), k_weight, EPS).view(k.shape)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def sdpa_of_normed(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Run:
    heads = normed(qkv, q_weight, k_weight)
    return lambda: F.scaled_dot_product_attention(*heads).transpose(1, 2)


def flex(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> dict[str, Provider | Run]:
    """FlexAttention with the norm folded in; on a GPU only, where it is compiled to Triton."""
    if qkv.device.type != "cuda":
        return {}
    from torch.nn.attention.flex_attention import flex_attention

    @torch.compile(fullgraph=True)
    def run(qkv, q_weight, k_weight):
        q, k, v = qkv.unbind(2)
        q_rstd, k_rstd = (torch.rsqrt(x.flatten(2).float().square().mean(-1) + EPS) for x in (q, k))
        fold = (q_weight.float() * k_weight.float()).view(HEADS, DIM)
        q = (q.float() * q_rstd[..., None, None] * fold).to(qkv.dtype)

        def columns(score, b, h, i, j):
            return score * k_rstd[b, j]

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flex_attention(q, k, v, score_mod=columns).transpose(1, 2)

    return {"FlexAttention": lambda: run(qkv, q_weight, k_weight)}
