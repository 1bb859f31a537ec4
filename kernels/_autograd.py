"""What an operator does under autograd and autocast where its file says nothing else."""

from collections.abc import Callable
from inspect import signature

import torch
from torch import Tensor, library
from torch.autograd import forward_ad


def register_autograd(
    into: library.Library,
    overload: torch._ops.OpOverload,
    backward: Callable,
    setup_context: Callable,
    implementations: dict[str, Callable],
) -> None:
    """What PyTorch's own `register_autograd` for a library does, in less time a call.

    Forward-mode differentiation is an error, where that would give zeros.

    Args:
        into: the library of the operator. backward, setup_context: as PyTorch's takes them.
        implementations: by dispatch key, what the library runs for it: called without asking the
            dispatcher a second time where nothing else is between autograd and that key.
    """
    defaults = tuple(argument.default_value for argument in overload._schema.arguments)
    below, after = torch._C._AutoDispatchBelowAutograd, torch._C._after_autograd_keyset
    redispatch, any_requires_grad = overload.redispatch, torch._C._any_requires_grad
    keys = torch._C.DispatchKey.__members__
    direct = {keys[name]: run for name, run in implementations.items()}

    def run_below(keyset, args):
        keyset = keyset & after
        implementation = direct.get(keyset.highestPriorityTypeId())
        with below():
            return implementation(*args) if implementation else redispatch(keyset, *args)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, *args):
            output = run_below(keyset, args)
            # The dispatcher leaves out trailing arguments that equal their defaults.
            setup_context(ctx, (*args, *defaults[len(args) :]), output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            needed = ctx.needs_input_grad
            ctx.needs_input_grad = needed[1:]  # without keyset's
            try:
                found = backward(ctx, *grads)
            finally:
                ctx.needs_input_grad = needed
            return None, *(found if isinstance(found, tuple) else (found,))

    def run(keyset, *args):
        if any_requires_grad(*args) and torch.is_grad_enabled():
            return Gradient.apply(keyset, *args)
        if forward_ad._current_level >= 0:
            _refuse_tangents(overload, args)
        return run_below(keyset, args)

    into.impl(overload._opname, run, "Autograd", with_keyset=True)


def _refuse_tangents(overload: torch._ops.OpOverload, args: tuple) -> None:
    tensors = (arg for arg in args if isinstance(arg, Tensor))
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            f"{overload._opname}: no forward-mode derivative; use reverse mode (backward, "
            "torch.autograd.grad)"
        )


def differentiate(reference: Callable) -> tuple[Callable, Callable]:
    """(backward, setup_context) that recompute the reference and differentiate it."""

    def setup_context(ctx, inputs, output) -> None:
        ctx.constants = [None if isinstance(arg, Tensor) else arg for arg in inputs]
        ctx.is_tensor = [isinstance(arg, Tensor) for arg in inputs]
        ctx.save_for_backward(*(arg for arg in inputs if isinstance(arg, Tensor)))

    def backward(ctx, *grads):
        saved = iter(ctx.saved_tensors)
        args = [
            next(saved) if is_tensor else constant
            for is_tensor, constant in zip(ctx.is_tensor, ctx.constants, strict=True)
        ]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]

        def forward(*tensors: Tensor):
            for i, tensor in zip(wanted, tensors, strict=True):
                args[i] = tensor
            return reference(*args)

        vjp = torch.func.vjp(forward, *(args[i] for i in wanted))[1]
        by_input = dict(zip(wanted, vjp(grads if len(grads) > 1 else grads[0]), strict=True))
        return tuple(by_input.get(i) for i in range(len(args)))

    return backward, setup_context


def cast_under_autocast(overload: torch._ops.OpOverload, device: str) -> Callable:
    """The operator with its floating tensors cast to autocast's dtype, as matrix products are."""
    key = torch._C.DispatchKey.__members__[f"Autocast{device.upper()}"]
    autocast = torch._C.DispatchKeySet(key)

    def cast(arg):
        if isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64:
            return arg.to(torch.get_autocast_dtype(device))
        return arg

    def run(*args):
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return overload(*(cast(arg) for arg in args))

    return run


def gradient(function: Callable, wanted: tuple[int, ...]) -> Callable:
    """The gradient of `function` with respect to arguments `wanted`, as an operator's reference.

    Takes the gradient of each output of `function`, then its arguments; returns a tuple, or the
    one tensor where one is wanted.
    """

    def run(*grads_and_args):
        args = list(grads_and_args[-_arity(function) :])
        grads = grads_and_args[: -len(args)]

        def forward(*tensors: Tensor):
            for i, tensor in zip(wanted, tensors, strict=True):
                args[i] = tensor
            return function(*args)

        vjp = torch.func.vjp(forward, *(args[i] for i in wanted))[1]
        found = vjp(grads if len(grads) > 1 else grads[0])
        # Contiguous, and none a view of another: operators must not return aliases.
        found = tuple(g.clone(memory_format=torch.contiguous_format) for g in found)
        return found if len(found) > 1 else found[0]

    return run


def _arity(function: Callable) -> int:
    return len(signature(function).parameters)
