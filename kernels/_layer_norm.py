"""What layer_norm and add_layer_norm share."""

import torch
from torch import Tensor

from ._norms import NormGradients, check_weight


def ones_and_zeros(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(weight, bias), with 1 and 0 in place of None: the kernels always read both."""
    if weight is not None and bias is not None:
        return weight, bias
    if weight is None:
        dtype = x.dtype if bias is None else bias.dtype
        weight = x.new_ones(x.shape[-1:], dtype=dtype)
    return weight, torch.zeros_like(weight) if bias is None else bias


def layer_norm_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float
) -> NormGradients:
    """PyTorch's own, in the dtype of weight, with the statistics computed again."""
    weight, bias = ones_and_zeros(x, weight, None)
    grad, wide, cols = grad.to(weight.dtype), x.to(weight.dtype), x.shape[-1:]
    _, mean, rstd = torch.ops.aten.native_layer_norm(wide, cols, weight, bias, eps)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        grad, wide, cols, mean, rstd, weight, bias, [True, True, True]
    )
    return NormGradients(dx.to(x.dtype), dweight, dbias)


def fake_sums(x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """(dweight, dbias), empty, as the gradient operators return them."""
    dtype = x.dtype if weight is None else weight.dtype
    return x.new_empty(x.shape[-1:], dtype=dtype), x.new_empty(x.shape[-1:], dtype=dtype)


def check_affine(operator: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Raises ValueError where weight or bias does not go with x (..., C)."""
    if weight is not None:
        check_weight(operator, x, weight)
    if bias is None:
        return
    dtypes = {x.dtype, torch.float32} if weight is None else {weight.dtype}
    if bias.shape != x.shape[-1:] or bias.dtype not in dtypes:
        raise ValueError(
            f"{operator}: bias must be {' or '.join(map(str, dtypes))}, of shape "
            f"{tuple(x.shape[-1:])}, got {bias.dtype} of shape {tuple(bias.shape)}"
        )
