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

from typing import NamedTuple

import torch
from torch import Tensor

from internvl_engine import reference

from ._library import define
from ._norms import check_norm, check_sum, layer_norm_backward_reference


class Gradients(NamedTuple):
    """Of the loss by each input; nothing for x and scale where there is no scale."""

    x: Tensor
    residual: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor


def _backward_reference(
    grad: Tensor, grad_residual: Tensor, x: Tensor, residual_out: Tensor, scale: Tensor | None,
    weight: Tensor | None, eps: float,
) -> Gradients:  # fmt: skip
    """The norm differentiated at residual_out, then the sum."""
    through_norm, dweight, dbias = layer_norm_backward_reference(grad, residual_out, weight, eps)
    dresidual = grad_residual + through_norm
    if scale is None:
        return Gradients(x.new_empty(0), dresidual, x.new_empty(0), dweight, dbias)
    dscale = (dresidual * x).flatten(0, -2).sum(0).to(scale.dtype)
    return Gradients((dresidual * scale).to(x.dtype), dresidual, dscale, dweight, dbias)


def _fake(x, residual, scale, weight, bias, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_backward(grad, grad_residual, x, residual_out, scale, weight, eps):
    dx = x.new_empty(0 if scale is None else x.shape)
    dscale = x.new_empty(0 if scale is None else scale.shape)
    vector = x.new_empty(x.shape[-1:], dtype=x.dtype if weight is None else weight.dtype)
    return Gradients(dx, x.new_empty(x.shape), dscale, vector, torch.empty_like(vector))


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
    reference=reference.add_layer_norm,
    fake=_fake,
    backward=(_backward, _save),
)

_add_layer_norm_backward = define(
    "add_layer_norm_backward(Tensor grad, Tensor grad_residual, Tensor x, Tensor residual_out,"
    " Tensor? scale, Tensor? weight, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    fake=_fake_backward,
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
    check_norm("add_layer_norm", x, weight, bias)
    return _add_layer_norm(x, residual, scale, weight, bias, eps)
