"""LayerNorm in Triton. What it computes: kernels/layer_norm.py; how: _norm.py."""

from collections.abc import Iterator

from torch import Tensor

from .._layer_norm import ones_and_zeros
from ._cross_compile import Case
from ._norm import norm_backward_triton, norm_cases, norm_triton
from ._tuning import Config


def layer_norm_triton(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """Launches the forward kernel; takes CPU tensors too under TRITON_INTERPRET=1."""
    return norm_triton("layer_norm", x, *ones_and_zeros(x, weight, bias), eps, config)


def layer_norm_backward_triton(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, config: Config | None = None
) -> tuple[Tensor, ...]:
    """(dx, dweight, dbias); the sums are reduced in two steps, in the same order on every run."""
    weight, _ = ones_and_zeros(x, weight, None)
    return norm_backward_triton("layer_norm", grad, x, weight, eps, True, config)


def cross_compile_cases(architecture: str) -> Iterator[Case]:
    """At the width of InternViT-300M, and at a wide one, as pixel-shuffled tokens have."""
    return norm_cases("layer_norm", (1024, 4096), architecture)
