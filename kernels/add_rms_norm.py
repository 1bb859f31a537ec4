"""Layer scale, residual add and the next RMSNorm in one pass.

    r = round(residual + x * scale)        y = weight * round(r / sqrt(mean(r**2) + eps))

In fp32 between the rounds: x * scale is not rounded by itself, which is more accurate than the
published layers, where it is. Source: InternVisionEncoderLayer in OpenGVLab/InternVL,
modeling_intern_vit.py (scale is ls1 or ls2), and LlamaDecoderLayer (no scale).

The gradient, with g the gradient of y, h that of r, and rms_norm's gradient as in rms_norm.py:

    dresidual = h + rms_norm'(g; r)    dx = dresidual * scale    dscale = sum of dresidual * x

x is (..., C); C is 3200 in the vision tower and 4096 in QLLaMA. Bound by memory: two reads and two
writes of x forward; four reads and two writes backward, three and one without a scale.
"""

import torch
from torch import Tensor

from internvl_engine import reference

from ._autograd import vjp
from ._library import contiguous, define, triton_launcher
from ._norms import (
    RMS,
    add_backward_reference,
    add_norm_backward_native,
    add_norm_cuda,
    add_norm_native,
    check_sum,
    check_weight,
    fake_sum_gradients,
)

# Of the loss by x and scale (empty without a scale), residual and weight, in the schema's order.
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def add_rms_norm_native(
    x: Tensor, residual: Tensor, scale: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Calls csrc/cpu/norm.h."""
    return add_norm_native(RMS, x, residual, scale, weight, None, eps)


def add_rms_norm_cuda(
    x: Tensor, residual: Tensor, scale: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Calls csrc/cuda/add_rms_norm.cu."""
    return add_norm_cuda(RMS, x, residual, scale, weight, None, eps)


def add_rms_norm_backward_native(
    grad: Tensor, grad_residual: Tensor, x: Tensor, residual_out: Tensor, scale: Tensor | None,
    weight: Tensor, eps: float,
) -> Gradients:  # fmt: skip
    """Calls csrc/cpu/norm_backward.h."""
    inputs = (grad, grad_residual, x, residual_out, scale, weight, eps)
    found = add_norm_backward_native(RMS, *inputs)
    return found if found is NotImplemented else found[:4]


def _add_rms_norm_backward_reference(
    grad: Tensor, grad_residual: Tensor, x: Tensor, residual_out: Tensor, scale: Tensor | None,
    weight: Tensor, eps: float,
) -> Gradients:  # fmt: skip
    """The norm differentiated at residual_out, then the sum."""
    through_norm, dweight = vjp(reference.rms_norm, (residual_out, weight, eps), (0, 1), (grad,))
    return *add_backward_reference(through_norm, grad_residual, x, scale), dweight


def _fake(x, residual, scale, weight, eps):
    dtype = x.dtype if scale is None else torch.promote_types(x.dtype, scale.dtype)
    residual_out = x.new_empty(x.shape, dtype=torch.promote_types(residual.dtype, dtype))
    y_dtype = torch.promote_types(residual_out.dtype, weight.dtype)
    return residual_out.new_empty(x.shape, dtype=y_dtype), residual_out


def _fake_backward(grad, grad_residual, x, residual_out, scale, weight, eps):
    return *fake_sum_gradients(x, residual_out, scale), weight.new_empty(weight.shape)


def _save(ctx, inputs, output) -> None:
    x, _, scale, weight, ctx.eps = inputs
    ctx.save_for_backward(x, output[1], scale, weight)


def _backward(ctx, grad, grad_residual):
    x, residual_out, scale, weight = ctx.saved_tensors
    dx, dresidual, dscale, dweight = _add_rms_norm_backward(
        grad, grad_residual, x, residual_out, scale, weight, ctx.eps
    )
    if scale is None:
        return dresidual, dresidual, None, dweight, None
    return dx, dresidual, dscale, dweight, None


_add_rms_norm = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? scale, Tensor weight, float eps)"
    " -> (Tensor, Tensor)",
    reference=contiguous(reference.add_rms_norm),
    fake=_fake,
    cpu={"native": add_rms_norm_native},
    cuda={"triton": triton_launcher("add_rms_norm"), "cuda": add_rms_norm_cuda},
    backward=(_backward, _save),
)

_add_rms_norm_backward = define(
    "add_rms_norm_backward(Tensor grad, Tensor grad_residual, Tensor x, Tensor residual_out,"
    " Tensor? scale, Tensor weight, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=contiguous(_add_rms_norm_backward_reference),
    fake=_fake_backward,
    cpu={"native": add_rms_norm_backward_native},
    cuda={"triton": triton_launcher("add_rms_norm", "add_rms_norm_backward_triton")},
)


def add_rms_norm(
    x: Tensor, residual: Tensor, scale: Tensor | None, weight: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Adds x * scale to the residual stream and normalises the sum.

    Args:
        x: (..., C), what a block adds; any strides; float32, float16 or bfloat16.
        residual: the shape and dtype of x, any strides.
        scale: (C,), the dtype of x: the layer scale; None for 1.
        weight: (C,), the norm's, of the dtype of x, or float32 with 16-bit x.
        eps: added to the mean square.

    Returns:
        (y, residual_out), each (..., C), contiguous. residual_out has the dtype of x; y that to
        which x and weight promote.

    Raises:
        ValueError: shapes or dtypes that do not go together.
    """
    check_sum("add_rms_norm", x, residual, scale)
    check_weight("add_rms_norm", x, weight)
    return _add_rms_norm(x, residual, scale, weight, eps)
