"""What the linears share: gradients, and the definition of those whose weight is a constant.

A weight in a form of its own, packed or of 8 or 4 bits, has no gradient; x, bias and residual have.
They are plain matrix products with the values that the form has, made for the time of the call.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_engine.reference import linear as linear_reference

from ._epilogue import epilogue_backward, output_shape
from ._invariance import is_batch_invariant
from ._library import Backends, contiguous, define


def linear_backward_blas(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, weight and bias that are wanted; empty tensors for the others."""
    if epilogue != "none":  # the product again: only direct calls of the operator come here
        y = F.linear(x, weight, bias)
        grad = epilogue_backward(grad.to(y.dtype), y, epilogue)
    rows, x_rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    rows = rows.to(x.dtype)
    empty = x.new_empty(0)
    return (
        (rows @ weight).view(x.shape) if wanted[0] else empty,
        rows.t() @ x_rows if wanted[1] else empty,
        rows.sum(0) if wanted[2] else empty,
    )


def inputs_needing_gradient(ctx, count: int) -> list[bool]:
    """ctx.needs_input_grad for all `count` inputs: torch leaves out trailing defaults."""
    needs = list(ctx.needs_input_grad)
    return needs + [False] * (count - len(needs))


def define_linear(
    name: str, weight: str, *, features: Callable[..., int], dense: Callable[..., Tensor],
    reference: Callable[..., Tensor] | None = None, cpu: Backends | None = None,
    cuda: Backends | None = None,
) -> Any:  # fmt: skip
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
    form = _Form(len(weight.split(",")), features, dense)
    form.gradients = define(
        f"{name}_backward(Tensor grad, Tensor x, {weight}, Tensor? bias, str epilogue, "
        "bool[2] wanted) -> (Tensor, Tensor)",
        reference=form.backward_reference,
        fake=form.backward_fake,
    )
    return define(
        f"{name}(Tensor x, {weight}, Tensor? bias=None, str epilogue='none', "
        "Tensor? residual=None) -> Tensor",
        reference=contiguous(reference or form.reference),
        fake=form.fake,
        cpu=cpu,
        cuda=cuda,
        backward=(form.backward, form.save),
    )


class _Form:
    """A form of weights: what its operators share.

    Args:
        count: of the arguments that are the weight.
        features, dense: as `define_linear`.
    """

    gradients: Any  # the operator

    def __init__(
        self, count: int, features: Callable[..., int], dense: Callable[..., Tensor]
    ) -> None:
        self.count, self.features, self.dense = count, features, dense

    def reference(self, x: Tensor, *others: Any) -> Tensor:
        """Makes the dense values and computes with them."""
        values = self.dense(*others[: self.count], x.shape[-1], x.dtype)
        # The operator keeps its own promise; without it, the reference is plain PyTorch.
        if is_batch_invariant():
            return torch.ops.internvl.linear.default(x, values, *others[self.count :])
        return linear_reference(x, values, *others[self.count :])

    def fake(self, x: Tensor, *others: Any) -> Tensor:
        """An empty result."""
        given: list[Any] = [*others[self.count :]]
        _, epilogue, residual = given + [None, "none", None][len(given) :]
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        shape = output_shape(x, self.features(*others[: self.count]), epilogue)
        return x.new_empty(shape, dtype=dtype)

    def backward_reference(self, grad: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        """The gradients of x and bias that are wanted; empty tensors for the others."""
        *held, bias, epilogue, wanted = others
        values = self.dense(*held, x.shape[-1], x.dtype)
        wanted = (wanted[0], False, wanted[1])
        dx, _, dbias = linear_backward_blas(grad, x, values, bias, epilogue, wanted)
        return dx, dbias

    def backward_fake(self, grad: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        """Empty gradients."""
        *held, _, _, wanted = others
        dbias = self.features(*held) if wanted[1] else 0
        return x.new_empty(x.shape if wanted[0] else 0), x.new_empty(dbias)

    def save(self, ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
        """Keeps what the gradients need."""
        x, *held, bias, ctx.epilogue, residual = inputs
        ctx.numbers = [None if isinstance(value, Tensor) else value for value in held]
        ctx.save_for_backward(x, bias, *(value for value in held if isinstance(value, Tensor)))
        ctx.residual_dtype = None if residual is None else residual.dtype

    def backward(self, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """A gradient for every argument that came."""
        x, bias, *tensors = ctx.saved_tensors
        left = iter(tensors)
        held = [next(left) if number is None else number for number in ctx.numbers]
        needs = inputs_needing_gradient(ctx, self.count + 4)
        of_x, of_bias, of_residual = needs[0], needs[self.count + 1], needs[self.count + 3]
        dx, dbias = self.gradients(grad, x, *held, bias, ctx.epilogue, [of_x, of_bias])
        dx, dbias = dx if of_x else None, dbias if of_bias else None
        dresidual = grad.to(ctx.residual_dtype) if of_residual else None
        found = (dx, *(None,) * self.count, dbias, None, dresidual)
        return found[: len(ctx.needs_input_grad)]
