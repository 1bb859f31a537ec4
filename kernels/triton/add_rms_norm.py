"""Residual add and RMSNorm in one pass, in Triton: kernels/add_rms_norm.py, _add_norm.py."""

from collections.abc import Iterator

from torch import Tensor

from ._add_norm import add_norm_backward_triton, add_norm_cases, add_norm_triton
from ._cross_compile import Case
from ._tuning import Config


def add_rms_norm_triton(
    x: Tensor, residual: Tensor, scale: Tensor | None, weight: Tensor, eps: float,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the forward kernel; takes CPU tensors too under TRITON_INTERPRET=1."""
    return add_norm_triton("add_rms_norm", x, residual, scale, weight, None, eps, config)


def add_rms_norm_backward_triton(
    grad: Tensor, grad_residual: Tensor, x: Tensor, residual_out: Tensor, scale: Tensor | None,
    weight: Tensor, eps: float, config: Config | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(dx, dresidual, dscale, dweight); dx and dscale are empty where there is no scale."""
    inputs = (grad, grad_residual, x, residual_out, scale, weight, eps)
    return add_norm_backward_triton("add_rms_norm", *inputs, False, config)


def cross_compile_cases(architecture: str) -> Iterator[Case]:
    """With layer scale at the vision tower's width, without at QLLaMA's."""
    return add_norm_cases("add_rms_norm", ((3200, True), (4096, False)), architecture)
