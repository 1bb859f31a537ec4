"""LayerNorm over the last dimension.

    y = round((x - mean(x)) / sqrt(mean((x - mean(x))**2) + eps) * weight + bias)

In fp32, rounded once: F.layer_norm's meaning, which InternViT-300M, CLIP, SigLIP and DINOv2 use.
The mean is found in two steps, so that rows far from zero lose nothing: x is first shifted by its
mean as a float, then by the mean of what is left.
Source: Ba, Kiros and Hinton, Layer Normalization, 2016; Chan, Golub and LeVeque, Algorithms for
Computing the Sample Variance, 1983, for the corrected two-pass variance.

The gradient, with n the normalised x and g = grad * weight, all in fp32:

    dx = rstd * (g - mean(g) - n * mean(g * n))
    dweight = sum over rows of grad * n            dbias = sum over rows of grad

x is (..., C); C is 1024 in InternViT-300M. Bound by memory: one read and one write of x forward,
two reads and one write backward. Mean and rstd are not saved: the row is in the cache or in
registers when the backward needs them.
"""

from torch import Tensor

from internvl_engine import reference

from ._layer_norm import (
    check_affine,
    fake_sums,
    layer_norm_backward_reference,
    ones_and_zeros,
)
from ._library import contiguous, define, triton_launcher
from ._norms import LAYER, NormGradients, norm_backward_native, norm_cuda, norm_native


def layer_norm_native(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Calls csrc/cpu/norm.h."""
    return norm_native(LAYER, x, *ones_and_zeros(x, weight, bias), eps)


def layer_norm_backward_native(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float
) -> NormGradients:
    """Calls csrc/cpu/norm_backward.h."""
    return norm_backward_native(LAYER, grad, x, ones_and_zeros(x, weight, None)[0], eps)


def layer_norm_cuda(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Calls csrc/cuda/rms_norm.cu."""
    return norm_cuda(LAYER, x, *ones_and_zeros(x, weight, bias), eps)


def _save(ctx, inputs, output) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad: Tensor):
    x, weight = ctx.saved_tensors
    dx, dweight, dbias = _layer_norm_backward(grad, x, weight, ctx.eps)
    return dx, None if weight is None else dweight, dbias if ctx.has_bias else None, None


_layer_norm = define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    reference=contiguous(reference.layer_norm),
    fake=lambda x, weight, bias, eps: x.new_empty(x.shape),
    cpu={"native": layer_norm_native},
    cuda={"triton": triton_launcher("layer_norm"), "cuda": layer_norm_cuda},
    backward=(_backward, _save),
)

_layer_norm_backward = define(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor? weight, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    reference=contiguous(layer_norm_backward_reference),
    fake=lambda grad, x, weight, eps: (x.new_empty(x.shape), *fake_sums(x, weight)),
    cpu={"native": layer_norm_backward_native},
    cuda={"triton": triton_launcher("layer_norm", "layer_norm_backward_triton")},
)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Shifts and scales each row of x to mean 0 and variance 1, then by weight and bias.

    Args:
        x: (..., C), any strides; float32, float16 or bfloat16.
        weight: (C,), the dtype of x, or float32 with 16-bit x; None for 1.
        bias: (C,), the dtype of weight, or of x where there is no weight; None for 0.
        eps: added to the variance.

    Returns:
        (..., C), contiguous, of the dtype of x: a float32 weight does not widen it, as in
        F.layer_norm on the CPU (on CUDA that raises for mixed dtypes).

    Raises:
        ValueError: weight or bias does not have the shape (C,), or a dtype that goes with x.
    """
    check_affine("layer_norm", x, weight, bias)
    return _layer_norm(x, weight, bias, eps)
