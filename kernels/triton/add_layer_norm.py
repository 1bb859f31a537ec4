"""Residual add and LayerNorm in one pass, in Triton: kernels/add_layer_norm.py, _add_norm.py."""

from collections.abc import Iterator

from torch import Tensor

from .._layer_norm import ones_and_zeros
from ._add_norm import add_norm_backward_triton, add_norm_cases, add_norm_triton
from ._cross_compile import Case
from ._tuning import Config


def add_layer_norm_triton(
    x: Tensor, residual: Tensor, scale: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, eps: float, config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the forward kernel; takes CPU tensors too under TRITON_INTERPRET=1."""
    vectors = ones_and_zeros(x, weight, bias)
    return add_norm_triton("add_layer_norm", x, residual, scale, *vectors, eps, config)


def add_layer_norm_backward_triton(
    grad: Tensor, grad_residual: Tensor, x: Tensor, residual_out: Tensor, scale: Tensor | None,
    weight: Tensor | None, eps: float, config: Config | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(dx, dresidual, dscale, dweight, dbias); no scale: dx and dscale are empty."""
    weight, _ = ones_and_zeros(x, weight, None)
    inputs = (grad, grad_residual, x, residual_out, scale, weight, eps)
    return add_norm_backward_triton("add_layer_norm", *inputs, True, config)


def cross_compile_cases(architecture: str) -> Iterator[Case]:
    """With layer scale as InternViT-300M has it, without as CLIP."""
    return add_norm_cases("add_layer_norm", ((1024, True), (1024, False)), architecture)
