"""QLLaMA's cross-attention of 96 queries to the vision tokens, forward and backward.

SDPA reads keys and values that were copied before to every row of the batch: what it would take to
copy them, and in the backward to sum their gradients, is not in its time.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_engine import reference
from internvl_engine.kernels import cross_attention

from .cases import Case, backward, forward, gradient_of, rival

HEADS, DIM, QUERIES = 32, 128, 96
# label: (images, rows an image, vision tokens)
SHAPES = {
    "one image 224 px": (1, 1, 257),
    "one image 448 px": (1, 1, 1025),
    "three rows an image": (2, 3, 257),
}
GPU_SHAPES = {"64 images 224 px": (64, 1, 257), "training, 64 images x 3": (64, 3, 257)}


def cases(device: str) -> Iterator[Case]:
    for label, (images, repeat, tokens) in (
        SHAPES | (GPU_SHAPES if device == "cuda" else {})
    ).items():
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        q = torch.randn(images * repeat, QUERIES, HEADS, DIM, **options).transpose(1, 2)
        k, v = torch.randn(2, images, tokens, HEADS, DIM, **options).transpose(2, 3)
        for direction in (forward, backward):
            yield _case(label, direction, q, k, v)


def _case(label: str, direction: Callable, q: Tensor, k: Tensor, v: Tensor) -> Case:
    """Forward reads q, k and v and writes out; backward reads those four and its gradient and
    writes three. Two and five products.
    """
    providers = direction(
        "attention", cross_attention, reference.cross_attention, q, k, v, others={}
    )
    repeat = q.shape[0] // k.shape[0]
    keys, values = (x.expand(repeat, *x.shape).flatten(0, 1).contiguous() for x in (k, v))
    sdpa = F.scaled_dot_product_attention
    if direction is forward:
        providers |= rival("SDPA", lambda: sdpa(q, keys, values))
    else:
        providers |= rival("SDPA", gradient_of(sdpa, q, keys, values), same=repeat == 1)
    parts, products = (2, 2) if direction is forward else (4, 5)
    label = f"{label}, {direction.__name__}"
    return Case(
        "cross_attention", label, tuple(q.shape), q.dtype, providers,
        parts * (q.numel() + k.numel()) * q.element_size(), products * 2 * q.numel() * k.shape[2],
    )  # fmt: skip
