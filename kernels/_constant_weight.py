"""Linears whose weight is a constant in a form of its own: packed, or of 8 or 4 bits.

The operator gives x, bias and residual gradients and its weight none. The gradients are plain
matrix products with the values that the form has, which are made for the time of the call.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from internvl_engine.reference import linear as linear_reference

from ._epilogue import output_shape
from ._invariance import is_batch_invariant
from ._library import contiguous, define
from .linear import inputs_needing_gradient, linear_backward_blas

Backends = Mapping[str, Callable | None]


def define_linear(
    name: str,
    weight: str,
    *,
    features: Callable[..., int],
    dense: Callable[..., Tensor],
    reference: Callable[..., Tensor] | None = None,
    cpu: Backends | None = None,
    cuda: Backends | None = None,
) -> Any:
    """Defines `name` and `name_backward`: linear(x, *weight, bias, epilogue, residual).

    Args:
        name: of the operator.
        weight: the arguments that are the weight, as a schema has them.
        features: (*weight) to its number of rows.
        dense: (*weight, columns, dtype) to its values (F, columns).
        reference: the meaning; None is `linear` with the dense values.
        cpu, cuda: as `define`.

    Returns:
        The overload to call.
    """
    count = len(weight.split(","))

    def fake(x: Tensor, *others: Any) -> Tensor:
        held = others[:count]
        _, epilogue, residual = (*others[count:], *(None, "none", None)[len(others) - count :])
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        return x.new_empty(output_shape(x, features(*held), epilogue), dtype=dtype)

    def backward_reference(grad: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        *held, bias, epilogue, wanted = others
        values = dense(*held, x.shape[-1], x.dtype)
        wanted = (wanted[0], False, wanted[1])
        dx, _, dbias = linear_backward_blas(grad, x, values, bias, epilogue, wanted)
        return dx, dbias

    def backward_fake(grad: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        *held, _, _, wanted = others
        dbias = features(*held) if wanted[1] else 0
        return x.new_empty(x.shape if wanted[0] else 0), x.new_empty(dbias)

    def save(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
        x, *held, bias, ctx.epilogue, residual = inputs
        ctx.numbers = [None if isinstance(value, Tensor) else value for value in held]
        ctx.save_for_backward(x, bias, *(value for value in held if isinstance(value, Tensor)))
        ctx.residual_dtype = None if residual is None else residual.dtype

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, *tensors = ctx.saved_tensors
        left = iter(tensors)
        held = [next(left) if number is None else number for number in ctx.numbers]
        needs = inputs_needing_gradient(ctx, count + 4)
        of_x, of_bias, of_residual = needs[0], needs[count + 1], needs[count + 3]
        dx, dbias = gradients(grad, x, *held, bias, ctx.epilogue, [of_x, of_bias])
        dresidual = grad.to(ctx.residual_dtype) if of_residual else None
        found = (
            dx if of_x else None,
            *(None,) * count,
            dbias if of_bias else None,
            None,
            dresidual,
        )
        return found[: len(ctx.needs_input_grad)]

    operator = define(
        f"{name}(Tensor x, {weight}, Tensor? bias=None, str epilogue='none', "
        "Tensor? residual=None) -> Tensor",
        reference=contiguous(reference or _with_dense_values(count, dense)),
        fake=fake,
        cpu=cpu,
        cuda=cuda,
        backward=(backward, save),
    )
    gradients = define(
        f"{name}_backward(Tensor grad, Tensor x, {weight}, Tensor? bias, str epilogue, "
        "bool[2] wanted) -> (Tensor, Tensor)",
        reference=backward_reference,
        fake=backward_fake,
    )
    return operator


def _with_dense_values(count: int, dense: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def linear(x: Tensor, *others: Any) -> Tensor:
        values = dense(*others[:count], x.shape[-1], x.dtype)
        # The operator keeps its own promise; without it, the reference is plain PyTorch.
        if is_batch_invariant():
            return torch.ops.internvl.linear.default(x, values, *others[count:])
        return linear_reference(x, values, *others[count:])

    return linear
