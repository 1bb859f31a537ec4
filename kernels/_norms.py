"""What RMSNorm and LayerNorm, by themselves and after a residual add, share."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _cuda
from ._library import NATIVE_TYPES, address, native, native_cuda
from ._rows import as_rows

RMS, LAYER = 0, 1  # as csrc/cpu/norm_call.h and csrc/cuda/operators.h number them
NO_ROWS = (0, 1, 0, 0)


class NormGradients(NamedTuple):
    """Of the loss by x, weight and bias (None of RMSNorm)."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None


class AddNormGradients(NamedTuple):
    """Of the loss by each input; nothing for x and scale without a scale, None for RMSNorm's bias.

    dx is dresidual without a scale, which an operator may not return twice.
    """

    x: Tensor
    residual: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor | None


def norm_native(norm: int, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Calls csrc/cpu/norm.h. norm: RMS or LAYER, which needs a bias."""
    dtype = NATIVE_TYPES.get(x.dtype)
    if dtype is None or weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return NotImplemented
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    cols = x.size(-1)
    x_rows, weight = as_rows(x), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    native.norm(
        dtype, norm, x_rows.pointer(), NO_ROWS, 0, weight.data_ptr(),
        0 if bias is None else bias.data_ptr(), y.data_ptr(), 0, y.numel() // max(cols, 1), cols,
        eps, torch.get_num_threads(),
    )  # fmt: skip
    return y


def add_norm_native(
    norm: int, x: Tensor, residual: Tensor, scale: Tensor | None, weight: Tensor,
    bias: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Calls csrc/cpu/norm.h. norm: RMS or LAYER, which needs a bias."""
    dtype = NATIVE_TYPES.get(x.dtype)
    if dtype is None or not _one_dtype(x, residual, scale, weight, bias):
        return NotImplemented
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    residual_out = torch.empty_like(y)
    cols = x.shape[-1]
    x_rows, residual_rows, weight = as_rows(x), as_rows(residual), weight.contiguous()
    scale, bias = _contiguous(scale), _contiguous(bias)
    native.norm(
        dtype, norm, x_rows.pointer(), residual_rows.pointer(), address(scale), weight.data_ptr(),
        address(bias), y.data_ptr(), residual_out.data_ptr(), y.numel() // max(cols, 1), cols, eps,
        torch.get_num_threads(),
    )  # fmt: skip
    return y, residual_out


def norm_backward_native(
    norm: int, grad: Tensor, x: Tensor, weight: Tensor, eps: float
) -> NormGradients:
    """Calls csrc/cpu/norm_backward.h."""
    dtype = NATIVE_TYPES.get(x.dtype)
    if dtype is None or not _one_dtype(grad, x, weight):
        return NotImplemented
    dx, cols = x.new_empty(x.shape), x.shape[-1]
    dweight = x.new_empty(cols, dtype=torch.float32)
    dbias = torch.empty_like(dweight) if norm == LAYER else None
    grad_rows, x_rows, weight = as_rows(grad), as_rows(x), weight.contiguous()
    native.norm_backward(
        dtype, norm, (grad_rows.pointer(), NO_ROWS, x_rows.pointer(), NO_ROWS), 0,
        weight.data_ptr(), dx.data_ptr(), 0, (dweight.data_ptr(), address(dbias), 0),
        dx.numel() // max(cols, 1), cols, eps, torch.get_num_threads(),
    )  # fmt: skip
    return NormGradients(dx, dweight.to(x.dtype), None if dbias is None else dbias.to(x.dtype))


def add_norm_backward_native(
    norm: int, grad: Tensor, grad_residual: Tensor, x: Tensor, residual_out: Tensor,
    scale: Tensor | None, weight: Tensor, eps: float,
) -> AddNormGradients:  # fmt: skip
    """Calls csrc/cpu/norm_backward.h."""
    dtype = NATIVE_TYPES.get(x.dtype)
    if dtype is None or not _one_dtype(grad, grad_residual, x, residual_out, scale, weight):
        return NotImplemented
    cols = x.shape[-1]
    dresidual, dweight = x.new_empty(x.shape), x.new_empty(cols, dtype=torch.float32)
    dx, dscale = x.new_empty(0), x.new_empty(0)
    if scale is not None:
        dx, dscale = torch.empty_like(dresidual), torch.empty_like(dweight)
    dbias = torch.empty_like(dweight) if norm == LAYER else None
    rows = (as_rows(grad), as_rows(grad_residual), as_rows(residual_out), as_rows(x))
    weight, scale = weight.contiguous(), _contiguous(scale)
    native.norm_backward(
        dtype, norm, tuple(each.pointer() for each in rows), address(scale), weight.data_ptr(),
        dresidual.data_ptr(), dx.data_ptr(),
        (dweight.data_ptr(), address(dbias), 0 if scale is None else dscale.data_ptr()),
        dresidual.numel() // max(cols, 1), cols, eps, torch.get_num_threads(),
    )  # fmt: skip
    dbias = None if dbias is None else dbias.to(x.dtype)
    return AddNormGradients(dx, dresidual, dscale.to(x.dtype), dweight.to(x.dtype), dbias)


def norm_cuda(norm: int, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Calls csrc/cuda/rms_norm.cu. RMSNorm's result is of the dtype of weight, LayerNorm's of x."""
    dtype, x_rows = _cuda.TYPES.get(x.dtype), as_rows(x)
    weight, bias = weight.contiguous(), _contiguous(bias)
    vectors = [as_rows(vector) for vector in (weight, bias) if vector is not None]
    if dtype is None or not _cuda.aligned(x_rows, *vectors):
        return NotImplemented
    y = x.new_empty(x.shape, dtype=weight.dtype if norm == RMS else x.dtype)
    if y.numel() > 0:
        cols = x.shape[-1]
        native_cuda.norm(
            dtype, _cuda.TYPES[weight.dtype], norm, x_rows.pointer(), weight.data_ptr(),
            address(bias), y.data_ptr(), y.numel() // cols, cols, eps, _cuda.stream(),
        )  # fmt: skip
    return y


def add_norm_cuda(
    norm: int, x: Tensor, residual: Tensor, scale: Tensor | None, weight: Tensor,
    bias: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Calls csrc/cuda/add_rms_norm.cu. The dtypes are those of norm_cuda."""
    dtype, x_rows, residual_rows = _cuda.TYPES.get(x.dtype), as_rows(x), as_rows(residual)
    weight, bias, scale = weight.contiguous(), _contiguous(bias), _contiguous(scale)
    vectors = [as_rows(vector) for vector in (weight, bias, scale) if vector is not None]
    if dtype is None or not _cuda.aligned(x_rows, residual_rows, *vectors):
        return NotImplemented
    y = x.new_empty(x.shape, dtype=weight.dtype if norm == RMS else x.dtype)
    residual_out = x.new_empty(x.shape)
    if y.numel() > 0:
        cols = x.shape[-1]
        native_cuda.add_norm(
            dtype, _cuda.TYPES[weight.dtype], norm, x_rows.pointer(), residual_rows.pointer(),
            address(scale), weight.data_ptr(), address(bias), y.data_ptr(),
            residual_out.data_ptr(), y.numel() // cols, cols, eps, _cuda.stream(),
        )  # fmt: skip
    return y, residual_out


def add_backward_reference(
    through_norm: Tensor, grad_residual: Tensor, x: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dresidual, dscale) from the gradient that came through the norm."""
    dresidual = grad_residual + through_norm
    if scale is None:
        return x.new_empty(0), dresidual, x.new_empty(0)
    dscale = (dresidual * x).flatten(0, -2).sum(0).to(scale.dtype)
    return (dresidual * scale).to(x.dtype), dresidual, dscale


def fake_sum_gradients(
    x: Tensor, residual_out: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dresidual, dscale), empty, as the gradient operators return them."""
    dresidual = residual_out.new_empty(x.shape)
    if scale is None:
        return x.new_empty(0), dresidual, x.new_empty(0)
    return x.new_empty(x.shape), dresidual, scale.new_empty(scale.shape)


def check_sum(operator: str, x: Tensor, residual: Tensor, scale: Tensor | None) -> None:
    """Raises ValueError where residual + x * scale is not a sum of one shape and dtype."""
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"{operator}: x and residual must have one shape and dtype, got {tuple(x.shape)} "
            f"{x.dtype} and {tuple(residual.shape)} {residual.dtype}"
        )
    if scale is not None and (scale.shape != x.shape[-1:] or scale.dtype != x.dtype):
        raise ValueError(
            f"{operator}: scale must be {x.dtype} of shape {tuple(x.shape[-1:])}, got "
            f"{scale.dtype} of shape {tuple(scale.shape)}"
        )


def check_weight(operator: str, x: Tensor, weight: Tensor) -> None:
    """Raises ValueError where weight does not go with x (..., C)."""
    if weight.shape != x.shape[-1:] or weight.dtype not in (x.dtype, torch.float32):
        raise ValueError(
            f"{operator}: weight must be {x.dtype} or float32, of shape {tuple(x.shape[-1:])} to "
            f"go with x of shape {tuple(x.shape)}, got {weight.dtype} of shape "
            f"{tuple(weight.shape)}"
        )


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _one_dtype(*tensors: Tensor | None) -> bool:
    return len({tensor.dtype for tensor in tensors if tensor is not None}) == 1
