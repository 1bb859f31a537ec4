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

from typing import NamedTuple

import torch
from torch import Tensor

from internvl_engine import reference

from . import _cuda
from ._autograd import vjp
from ._library import NATIVE_TYPES, address, define, native, native_cuda, triton_launcher
from ._rows import as_rows


class Gradients(NamedTuple):
    """Of the loss by x (nothing without a scale), residual, scale (nothing for none) and weight."""

    x: Tensor
    residual: Tensor
    scale: Tensor
    weight: Tensor


def add_rms_norm_native(
    x: Tensor, residual: Tensor, scale: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Calls csrc/cpu/add_rms_norm.h."""
    dtype = NATIVE_TYPES.get(x.dtype)
    if dtype is None or not _one_dtype(x, residual, scale, weight):
        return NotImplemented
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    residual_out = torch.empty_like(y)
    cols = x.shape[-1]
    x_rows, residual_rows, weight = as_rows(x), as_rows(residual), weight.contiguous()
    scale = None if scale is None else scale.contiguous()
    native.add_rms_norm(
        dtype, x_rows.pointer(), residual_rows.pointer(), address(scale),
        weight.data_ptr(), y.data_ptr(), residual_out.data_ptr(), y.numel() // max(cols, 1), cols,
        eps, torch.get_num_threads(),
    )  # fmt: skip
    return y, residual_out


def add_rms_norm_cuda(
    x: Tensor, residual: Tensor, scale: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Calls csrc/cuda/add_rms_norm.cu."""
    dtype, x_rows, residual_rows = _cuda.TYPES.get(x.dtype), as_rows(x), as_rows(residual)
    weight, scale = weight.contiguous(), None if scale is None else scale.contiguous()
    vectors = [as_rows(vector) for vector in (weight, scale) if vector is not None]
    if dtype is None or not _cuda.aligned(x_rows, residual_rows, *vectors):
        return NotImplemented
    y, residual_out = x.new_empty(x.shape, dtype=weight.dtype), x.new_empty(x.shape)
    if y.numel() > 0:
        cols = x.shape[-1]
        native_cuda.add_rms_norm(
            dtype, _cuda.TYPES[weight.dtype], x_rows.pointer(), residual_rows.pointer(),
            address(scale), weight.data_ptr(), y.data_ptr(),
            residual_out.data_ptr(), y.numel() // cols, cols, eps, _cuda.stream(),
        )  # fmt: skip
    return y, residual_out


def add_rms_norm_backward_native(
    grad: Tensor, grad_residual: Tensor, x: Tensor, residual_out: Tensor, scale: Tensor | None,
    weight: Tensor, eps: float,
) -> Gradients:  # fmt: skip
    """Calls csrc/cpu/add_rms_norm.h."""
    dtype = NATIVE_TYPES.get(x.dtype)
    if dtype is None or not _one_dtype(grad, grad_residual, x, residual_out, scale, weight):
        return NotImplemented
    cols = x.shape[-1]
    dresidual, dweight = x.new_empty(x.shape), x.new_empty(cols, dtype=torch.float32)
    dx, dscale = _none(x) if scale is None else (x.new_empty(x.shape), torch.empty_like(dweight))
    grads, passed, x_rows = as_rows(grad), as_rows(grad_residual), as_rows(x)
    residual_out, weight = residual_out.contiguous(), weight.contiguous()
    scale = None if scale is None else scale.contiguous()
    native.add_rms_norm_backward(
        dtype, grads.pointer(), passed.pointer(), x_rows.pointer(), residual_out.data_ptr(),
        address(scale), weight.data_ptr(), dx.data_ptr(),
        dresidual.data_ptr(), dweight.data_ptr(), 0 if scale is None else dscale.data_ptr(),
        dresidual.numel() // max(cols, 1), cols, eps, torch.get_num_threads(),
    )  # fmt: skip
    return Gradients(dx, dresidual, dscale.to(x.dtype), dweight.to(weight.dtype))


def _add_rms_norm_backward_reference(
    grad: Tensor, grad_residual: Tensor, x: Tensor, residual_out: Tensor, scale: Tensor | None,
    weight: Tensor, eps: float,
) -> Gradients:  # fmt: skip
    """The norm differentiated at residual_out, then the sum."""
    through_norm, dweight = vjp(reference.rms_norm, (residual_out, weight, eps), (0, 1), (grad,))
    dresidual = grad_residual + through_norm
    if scale is None:
        dx, dscale = _none(x)
        return Gradients(dx, dresidual, dscale, dweight)
    dscale = (dresidual * x).flatten(0, -2).sum(0).to(scale.dtype)
    return Gradients((dresidual * scale).to(x.dtype), dresidual, dscale, dweight)


def _none(x: Tensor) -> tuple[Tensor, Tensor]:
    """(dx, dscale) without a scale: dx is dresidual, which an operator may not return twice."""
    return x.new_empty(0), x.new_empty(0)


def _one_dtype(*tensors: Tensor | None) -> bool:
    return len({tensor.dtype for tensor in tensors if tensor is not None}) == 1


def _fake(x, residual, scale, weight, eps):
    dtype = x.dtype if scale is None else torch.promote_types(x.dtype, scale.dtype)
    residual_out = x.new_empty(x.shape, dtype=torch.promote_types(residual.dtype, dtype))
    y_dtype = torch.promote_types(residual_out.dtype, weight.dtype)
    return residual_out.new_empty(x.shape, dtype=y_dtype), residual_out


def _fake_backward(grad, grad_residual, x, residual_out, scale, weight, eps):
    dx, dscale = _none(x) if scale is None else (x.new_empty(x.shape), scale.new_empty(scale.shape))
    dresidual = residual_out.new_empty(x.shape)
    return Gradients(dx, dresidual, dscale, weight.new_empty(weight.shape))


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
    reference=reference.add_rms_norm,
    fake=_fake,
    cpu={"native": add_rms_norm_native},
    cuda={"triton": triton_launcher("add_rms_norm"), "cuda": add_rms_norm_cuda},
    backward=(_backward, _save),
)

_add_rms_norm_backward = define(
    "add_rms_norm_backward(Tensor grad, Tensor grad_residual, Tensor x, Tensor residual_out,"
    " Tensor? scale, Tensor weight, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_add_rms_norm_backward_reference,
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
    cols = x.shape[-1:]
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"add_rms_norm: x and residual must have one shape and dtype, got {tuple(x.shape)} "
            f"{x.dtype} and {tuple(residual.shape)} {residual.dtype}"
        )
    if weight.shape != cols or weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"add_rms_norm: weight must be {x.dtype} or float32, of shape {tuple(cols)}, got "
            f"{weight.dtype} of shape {tuple(weight.shape)}"
        )
    if scale is not None and (scale.shape != cols or scale.dtype != x.dtype):
        raise ValueError(
            f"add_rms_norm: scale must be {x.dtype} of shape {tuple(cols)}, got {scale.dtype} of "
            f"shape {tuple(scale.shape)}"
        )
    return _add_rms_norm(x, residual, scale, weight, eps)
