"""A weight that is held in another form than rows of numbers, and is still an ordinary tensor.

What an operator of PyTorch reads of it is `dense()`, a copy; what it writes goes back into the form
(`write`), also through views (`weight[0].zero_()`). So every operator is right, and only `linear`
is fast. The pattern is torchao's: a wrapper subclass with `__torch_dispatch__` whose inner tensors
torch.compile sees (`__tensor_flatten__`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .. import kernels

aten = torch.ops.aten
ALIASES = (aten.detach.default, aten.alias.default)


class _OnDense(Tensor):
    """A tensor without memory of its own, on whose dense values PyTorch's operators work."""

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    def opened(self) -> tuple[Tensor, Tensor]:
        """(the dense values of the whole weight, this tensor as a view of them)."""
        raise NotImplementedError

    def write(self, values: Tensor) -> None:
        """Takes the dense values of the whole weight."""
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        opened: dict[int, tuple[_OnDense, Tensor, Tensor]] = {}

        def dense(x: Any) -> Any:
            if not isinstance(x, _OnDense):
                return x
            if id(x) not in opened:
                opened[id(x)] = (x, *x.opened())
            return opened[id(x)][2]

        kwargs = kwargs or {}
        output = func(*tree_map(dense, args), **tree_map(dense, kwargs))
        if func._schema.is_mutable:
            for held in _written(func, args, kwargs):
                held.write(opened[id(held)][1])
            held_of = {id(view): held for held, _, view in opened.values()}
            return tree_map(lambda x: held_of.get(id(x), x), output)
        if isinstance(args[0], _OnDense) and _is_view(func):
            if isinstance(output, Tensor):
                return _View(args[0], output, func, args[1:], kwargs)
            return [
                _View(args[0], each, func, args[1:], kwargs, index)
                for index, each in enumerate(output)
            ]
        return output


class WeightTensor(_OnDense):
    """The weight (F, C) of a linear layer in a form of its own."""

    def dense(self) -> Tensor:
        """The values (F, C) in memory of their own."""
        raise NotImplementedError

    def linear(
        self, x: Tensor, bias: Tensor | None, epilogue: str, residual: Tensor | None
    ) -> Tensor:
        """residual + epilogue(x @ self.T + bias), without a gradient of this weight."""
        raise NotImplementedError

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """The names of the inner tensors, and what else makes the form, for torch.compile."""
        raise NotImplementedError

    def take(self, places: Tensor) -> Tensor:  # type: ignore[override]
        """The values at some places of the flat weight, as `torch.take`; samples stay cheap so."""
        return torch.take(self.dense(), places)

    def alias(self) -> "WeightTensor":
        """Another tensor with the same inner ones."""
        raise NotImplementedError

    def opened(self) -> tuple[Tensor, Tensor]:
        values = self.dense()
        return values, values

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in ALIASES:
            return args[0].alias()
        if func is torch.ops.internvl.linear.default and not isinstance(args[0], _OnDense):
            defaults: tuple[Any, ...] = (None, "none", None)  # which the dispatcher leaves out
            return args[1].linear(args[0], *args[2:], *defaults[len(args) - 2 :])
        if func is aten.take.default and isinstance(args[0], WeightTensor):
            return args[0].take(args[1])
        if func is aten.copy_.default and type(args[1]) is Tensor:
            weight, values = args[:2]
            weight.write(values.expand(weight.shape).to(weight.device, weight.dtype))
            return weight
        return super().__torch_dispatch__(func, types, args, kwargs)

    @property  # type: ignore[misc]
    def data(self) -> Tensor:  # type: ignore[override]
        """The same weight, not recorded by autograd."""
        return self.detach()

    @data.setter
    def data(self, values: Tensor) -> None:
        # PyTorch's own would take over the outside of the tensor and leave the form.
        same = (values.shape, values.dtype, values.device) == (self.shape, self.dtype, self.device)
        with torch.no_grad():
            if same:
                self.copy_(values)
            else:
                swap(self, values)

    def numpy(self, *, force: bool = False) -> Any:
        """The dense values; a write to them does not reach the weight."""
        return self.dense().numpy(force=force)

    def tolist(self) -> Any:
        """The dense values as lists."""
        return self.dense().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = _plain_copy(self)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        if isinstance(self, nn.Parameter):
            return nn.Parameter, (self.dense(), self.requires_grad)
        return self.dense().__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, {self.dtype})"


class _View(_OnDense):
    """A view of a weight: what is written to it is written to the weight."""

    @staticmethod
    def __new__(cls, base: _OnDense, values: Tensor, *recipe: Any) -> Any:
        return Tensor._make_wrapper_subclass(
            cls, values.shape, values.stride(), dtype=values.dtype, device=values.device
        )

    def __init__(
        self, base: _OnDense, values: Tensor, func: Any, args: tuple, kwargs: dict,
        index: int | None = None,
    ) -> None:  # fmt: skip
        self.base, self.recipe = base, (func, args, kwargs, index)

    def opened(self) -> tuple[Tensor, Tensor]:
        func, args, kwargs, index = self.recipe
        whole, base = self.base.opened()
        view = func(base, *args, **kwargs)
        return whole, view if index is None else view[index]

    def write(self, values: Tensor) -> None:
        self.base.write(values)

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self.opened()[1])


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """residual + epilogue(x @ weight.T + bias) with a weight in any form; see `kernels.linear`."""
    if isinstance(weight, WeightTensor) and not torch.compiler.is_compiling():
        if not (weight.requires_grad and torch.is_grad_enabled()):
            return weight.linear(x, bias, epilogue, residual)
    return kernels.linear(x, weight, bias, epilogue, residual)


def make_plain(parameter: nn.Parameter) -> None:
    """Gives a parameter in another form its dense values; it stays the same object.

    What somebody else keeps from being swapped (a weak reference, a graph that is alive) stays as
    it is: every form computes the same.
    """
    if isinstance(parameter, WeightTensor):
        swap(parameter, parameter.dense())


def swap(parameter: Tensor, values: Tensor) -> bool:
    """Makes a parameter hold other values, in any form, as the same object.

    Its gradient, hooks and attributes stay.

    Returns:
        Whether it could: PyTorch refuses where weak references or a live graph hold it.
    """
    gradient, parameter.grad = parameter.grad, None
    backward_hooks = parameter._backward_hooks
    gradient_hooks = parameter._post_accumulate_grad_hooks
    other = nn.Parameter(values, parameter.requires_grad)
    vars(other).update((k, v) for k, v in vars(parameter).items() if k not in _form_of(parameter))
    try:
        torch.utils.swap_tensors(parameter, other)
    except RuntimeError:
        return False
    finally:
        parameter.grad = gradient
    if backward_hooks is not None:
        parameter._backward_hooks = backward_hooks
    if gradient_hooks is not None:
        parameter._post_accumulate_grad_hooks = gradient_hooks
    return True


def _form_of(parameter: Tensor) -> tuple[str, ...]:
    """The attributes that hold the values of a parameter, which are not its user's."""
    inner = parameter.__tensor_flatten__()[0] if isinstance(parameter, WeightTensor) else ()
    return (*inner, "_is_param")


def _plain_copy(weight: WeightTensor) -> Tensor:
    values = weight.dense()
    is_parameter = isinstance(weight, nn.Parameter)
    return nn.Parameter(values, weight.requires_grad) if is_parameter else values


def _is_view(func: Any) -> bool:
    return any(value.alias_info is not None for value in func._schema.returns)


def _written(func: Any, args: tuple, kwargs: dict) -> list[_OnDense]:
    """The tensors in a form of their own to which an operator writes."""
    named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    return [
        leaf
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        for leaf in tree_leaves(named.get(argument.name))
        if isinstance(leaf, _OnDense)
    ]
