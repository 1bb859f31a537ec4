"""What RMSNorm and LayerNorm, with and without the residual add before them, share."""

from typing import NamedTuple

import torch
from torch import Tensor


class LayerNormGradients(NamedTuple):
    """Of the loss by x, weight and bias."""

    x: Tensor
    weight: Tensor
    bias: Tensor


def ones_and_zeros(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(weight, bias) of LayerNorm with 1 and 0 in place of None: one kernel serves all four."""
    dtype = next((v.dtype for v in (weight, bias) if v is not None), x.dtype)
    if weight is None:
        weight = x.new_ones(x.shape[-1:], dtype=dtype)
    return weight, x.new_zeros(x.shape[-1:], dtype=dtype) if bias is None else bias


def layer_norm_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float
) -> LayerNormGradients:
    """PyTorch's own, in the dtype of weight, with the statistics computed again."""
    weight, bias = ones_and_zeros(x, weight, None)
    grad, wide, cols = grad.to(weight.dtype), x.to(weight.dtype), x.shape[-1:]
    _, mean, rstd = torch.ops.aten.native_layer_norm(wide, cols, weight, bias, eps)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        grad, wide, cols, mean, rstd, weight, bias, [True, True, True]
    )
    return LayerNormGradients(dx.to(x.dtype), dweight, dbias)


def check_norm(operator: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Raises ValueError where weight or bias does not go with x (..., C)."""
    cols, first = x.shape[-1:], None
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        dtypes = {x.dtype, torch.float32} if first is None else {first}
        if vector.shape != cols or vector.dtype not in dtypes:
            needed = f"{x.dtype} or float32" if first is None else f"{first} as the weight"
            raise ValueError(
                f"{operator}: {name} must be {needed}, of shape {tuple(cols)} to go with x of "
                f"shape {tuple(x.shape)}, got {vector.dtype} of shape {tuple(vector.shape)}"
            )
        first = vector.dtype


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
