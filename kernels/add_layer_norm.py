"""Layer scale, residual add and the next LayerNorm in one pass.

    r = round(residual + x * scale)        y = layer_norm(r, weight, bias, eps)

In fp32 between the rounds: x * scale is not rounded by itself, which is more accurate than eager
layers, where it is. Source: InternVisionEncoderLayer in OpenGVLab/InternVL, modeling_intern_vit.py
(scale is ls1 or ls2); CLIP's and SigLIP's layers have no scale.

The gradient, with g the gradient of y, h that of r, and layer_norm's gradient as in layer_norm.py:

    dresidual = h + layer_norm'(g; r)    dx = dresidual * scale    dscale = sum of dresidual * x

x is (..., C); C is 1024 in InternViT-300M. Bound by memory: two reads and two writes of x forward;
four reads and two writes backward, three and one without a scale.
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
from ._norms import (
    LAYER,
    AddNormGradients,
    add_backward_reference,
    add_norm_backward_native,
    add_norm_cuda,
    add_norm_native,
    check_sum,
    fake_sum_gradients,
)


def add_layer_norm_native(
    x: Tensor, residual: Tensor, scale: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Calls csrc/cpu/norm.h."""
    return add_norm_native(LAYER, x, residual, scale, *ones_and_zeros(x, weight, bias), eps)


def add_layer_norm_cuda(
    x: Tensor, residual: Tensor, scale: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Calls csrc/cuda/add_rms_norm.cu."""
    return add_norm_cuda(LAYER, x, residual, scale, *ones_and_zeros(x, weight, bias), eps)


def add_layer_norm_backward_native(
    grad: Tensor, grad_residual: Tensor, x: Tensor, residual_out: Tensor, scale: Tensor | None,
    weight: Tensor | None, eps: float,
) -> AddNormGradients:  # fmt: skip
    """Calls csrc/cpu/norm_backward.h."""
    weight, _ = ones_and_zeros(x, weight, None)
    inputs = (grad, grad_residual, x, residual_out, scale, weight, eps)
    return add_norm_backward_native(LAYER, *inputs)


def _add_layer_norm_backward_reference(
    grad: Tensor, grad_residual: Tensor, x: Tensor, residual_out: Tensor, scale: Tensor | None,
    weight: Tensor | None, eps: float,
) -> AddNormGradients:  # fmt: skip
    """The norm differentiated at residual_out, then the sum."""
    norm = layer_norm_backward_reference(grad, residual_out, weight, eps)
    sums = add_backward_reference(norm.x, grad_residual, x, scale)
    return AddNormGradients(*sums, norm.weight, norm.bias)


def _fake(x, residual, scale, weight, bias, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_backward(grad, grad_residual, x, residual_out, scale, weight, eps):
    return *fake_sum_gradients(x, residual_out, scale), *fake_sums(x, weight)


def _save(ctx, inputs, output) -> None:
    x, _, scale, weight, bias, ctx.eps = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, output[1], scale, weight)


def _backward(ctx, grad, grad_residual):
    x, residual_out, scale, weight = ctx.saved_tensors
    dx, dresidual, dscale, dweight, dbias = _add_layer_norm_backward(
        grad, grad_residual, x, residual_out, scale, weight, ctx.eps
    )
    if scale is None:
        dx, dscale = dresidual, None
    dweight = None if weight is None else dweight
    return dx, dresidual, dscale, dweight, dbias if ctx.has_bias else None, None


_add_layer_norm = define(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? scale, Tensor? weight, Tensor? bias,"
    " float eps) -> (Tensor, Tensor)",
    reference=contiguous(reference.add_layer_norm),
    fake=_fake,
    cpu={"native": add_layer_norm_native},
    cuda={"triton": triton_launcher("add_layer_norm"), "cuda": add_layer_norm_cuda},
    backward=(_backward, _save),
)

_add_layer_norm_backward = define(
    "add_layer_norm_backward(Tensor grad, Tensor grad_residual, Tensor x, Tensor residual_out,"
    " Tensor? scale, Tensor? weight, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=contiguous(_add_layer_norm_backward_reference),
    fake=_fake_backward,
    cpu={"native": add_layer_norm_backward_native},
    cuda={"triton": triton_launcher("add_layer_norm", "add_layer_norm_backward_triton")},
)


def add_layer_norm(
    x: Tensor, residual: Tensor, scale: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Adds x * scale to the residual stream and normalises the sum.

    Args:
        x: (..., C), what a block adds; any strides; float32, float16 or bfloat16.
        residual: the shape and dtype of x, any strides.
        scale: (C,), the dtype of x: the layer scale; None for 1.
        weight: (C,), the norm's, of the dtype of x, or float32 with 16-bit x; None for 1.
        bias: (C,), the norm's, of the dtype of weight, or of x without one; None for 0.
        eps: added to the variance.

    Returns:
        (y, residual_out), each (..., C), contiguous, of the dtype of x.

    Raises:
        ValueError: shapes or dtypes that do not go together.
    """
    check_sum("add_layer_norm", x, residual, scale)
    check_affine("add_layer_norm", x, weight, bias)
    return _add_layer_norm(x, residual, scale, weight, bias, eps)
