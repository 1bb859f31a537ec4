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

    def whole(self) -> "WeightTensor":
        """The weight that this tensor is, or is a view of."""
        raise NotImplementedError

    def within(self, values: Tensor) -> Tensor:
        """This tensor as a view of the dense values of the whole weight."""
        raise NotImplementedError

    def values(self) -> Tensor:
        """A copy of what this tensor holds."""
        return self.within(self.whole().dense())

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        # By the memory of a weight, which several tensors of one call may be views of.
        wholes: dict[int, tuple[WeightTensor, Tensor]] = {}
        held_of: dict[int, _OnDense] = {}

        def dense(x: Any) -> Any:
            if not isinstance(x, _OnDense):
                return x
            whole = x.whole()
            key = whole.memory()
            if key not in wholes:
                wholes[key] = whole, whole.dense()
            view = x.within(wholes[key][1])
            held_of[id(view)] = x
            return view

        kwargs = kwargs or {}
        opened = tree_map(dense, (args, kwargs))
        output = func(*opened[0], **opened[1])
        if func._schema.is_mutable:
            for key in {held.whole().memory() for held in _written(func, args, kwargs)}:
                whole, values = wholes[key]
                whole.write(values)
            return tree_map(lambda x: held_of.get(id(x), x), output)
        if isinstance(args[0], _OnDense) and _is_view(func):
            if isinstance(output, Tensor):
                return _View(args[0], output, func, args[1:], kwargs)
            return [
                _View(args[0], each, func, args[1:], kwargs, index)
                for index, each in enumerate(output)
            ]
        return output

    @property  # type: ignore[misc]
    def data(self) -> Tensor:  # type: ignore[override]
        """The same tensor, not recorded by autograd.

        Not for the `.data` of a plain parameter: PyTorch would take an empty tensor over without
        a word. Give that one `dense()`, or its Linear this parameter.
        """
        return self.detach()

    @data.setter
    def data(self, values: Tensor) -> None:
        # PyTorch's own would take over the outside of the tensor and leave the form.
        same = (values.shape, values.dtype, values.device) == (self.shape, self.dtype, self.device)
        with torch.no_grad():
            if same:
                self.copy_(values)
            elif not swap(self, values):
                raise RuntimeError(
                    f"{type(self).__name__}: {values.dtype} data of shape {tuple(values.shape)} "
                    f"cannot replace {self.dtype} of {tuple(self.shape)} while a graph that is "
                    "alive, or a weak reference, holds it"
                )

    def numpy(self, *, force: bool = False) -> Any:
        """The dense values; a write to them does not reach the weight."""
        return self.values().numpy(force=force)

    def tolist(self) -> Any:
        """The dense values as lists."""
        return self.values().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = self._plain_copy()
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return self._plain_copy().__reduce_ex__(protocol)

    def _plain_copy(self) -> Tensor:
        values = self.values().clone()
        is_parameter = isinstance(self, nn.Parameter)
        return nn.Parameter(values, self.requires_grad) if is_parameter else values


class WeightTensor(_OnDense):
    """The weight (F, C) of a linear layer in a form of its own."""

    # Whether `dense()` has the bits that the form was made from, so that it may come and go.
    is_reversible = True

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

    def write(self, values: Tensor) -> None:
        """Takes the dense values of the weight."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of the form."""
        raise NotImplementedError

    def memory(self) -> int:
        """What identifies the inner tensors, which aliases of a weight share."""
        return id(getattr(self, self.__tensor_flatten__()[0][0]))

    def whole(self) -> "WeightTensor":
        return self

    def within(self, values: Tensor) -> Tensor:
        return values

    def share_memory_(self) -> Any:
        """Moves the inner tensors to shared memory."""
        for name in self.__tensor_flatten__()[0]:
            getattr(self, name).share_memory_()
        return self

    def is_shared(self) -> bool:
        """Whether the inner tensors are in shared memory."""
        return all(getattr(self, name).is_shared() for name in self.__tensor_flatten__()[0])

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

    def whole(self) -> WeightTensor:
        return self.base.whole()

    def within(self, values: Tensor) -> Tensor:
        func, args, kwargs, index = self.recipe
        view = func(self.base.within(values), *args, **kwargs)
        return view if index is None else view[index]

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self.values())


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """residual + epilogue(x @ weight.T + bias) with a weight in any form; see `kernels.linear`."""
    if isinstance(weight, WeightTensor) and not torch.compiler.is_compiling():
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return weight.linear(x, bias, epilogue, residual)
    return kernels.linear(x, weight, bias, epilogue, residual)


def swap(parameter: Tensor, values: Tensor) -> bool:
    """Makes a parameter hold other values, in any form, as the same object.

    Its gradient, hooks and attributes stay.

    Returns:
        Whether it could: PyTorch refuses where a weak reference or a graph that is alive holds it,
        and hooks on its node in such a graph would be lost.
    """
    gradient, parameter.grad = parameter.grad, None
    if parameter._use_count() > 1:  # type: ignore[attr-defined]
        parameter.grad = gradient
        return False
    backward_hooks = parameter._backward_hooks
    gradient_hooks = parameter._post_accumulate_grad_hooks
    other = nn.Parameter(values, parameter.requires_grad)
    vars(other).update((k, v) for k, v in vars(parameter).items() if k not in _form_of(parameter))
    try:
        torch.utils.swap_tensors(parameter, other)
    except RuntimeError:
        return False
    finally:
        fits = gradient is None or gradient.shape == parameter.shape
        parameter.grad = gradient if fits and _same_kind(gradient, parameter) else None
    if backward_hooks is not None:
        parameter._backward_hooks = backward_hooks
    if gradient_hooks is not None:
        parameter._post_accumulate_grad_hooks = gradient_hooks
    return True


def _form_of(parameter: Tensor) -> tuple[str, ...]:
    """The attributes that hold the values of a parameter, which are not its user's."""
    inner = parameter.__tensor_flatten__()[0] if isinstance(parameter, WeightTensor) else ()
    return (*inner, "_is_param")


def _same_kind(gradient: Tensor | None, parameter: Tensor) -> bool:
    return gradient is None or (gradient.dtype, gradient.device) == (
        parameter.dtype,
        parameter.device,
    )


def make_plain(module: Any, replace: bool = False) -> None:
    """Gives the parameters of a module that are in another form their dense values.

    Quantized ones, whose values were others once, stay as they are. Each stays the same object.
    Where PyTorch refuses that, it keeps its form, which computes the same, or with `replace` is
    replaced by another parameter, as `Module.to` replaces some.
    """
    for each in module.modules():
        parameters: dict[str, Any] = each._parameters
        for name, parameter in parameters.items():
            if isinstance(parameter, WeightTensor) and parameter.is_reversible:
                values = parameter.dense()
                if not swap(parameter, values) and replace:
                    parameters[name] = nn.Parameter(values, parameter.requires_grad)


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
