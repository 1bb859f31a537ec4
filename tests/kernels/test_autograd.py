"""Every operator under autograd, torch.func's transforms, and as tensor subclasses meet it."""

from contextlib import nullcontext

import pytest
import torch
from operator_examples import WITHOUT_GRADIENT, examples
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap

from internvl_engine import kernels
from internvl_engine.kernels import _library

OPERATORS = sorted(set(examples()) - {*WITHOUT_GRADIENT})
ONE_DIFFERENTIABLE = ("attention", "qk_norm_attention")  # the others are statistics


class Case:
    """A scalar function of the floating arguments of an operator."""

    def __init__(self, operator: str) -> None:
        self.operator = operator
        self.arguments = examples()[operator]
        overload = getattr(torch.ops.internvl, operator).default
        names = [argument.name for argument in overload._schema.arguments]
        self.indices = [
            i
            for i, x in enumerate(self.arguments)
            if isinstance(x, torch.Tensor)
            and x.is_floating_point()
            and names[i] not in ("packed", "scales", "cos", "sin")  # constants
        ]
        self.tensors = [self.arguments[i] for i in self.indices]
        self.every = tuple(range(len(self.tensors)))
        self.overload = overload
        self.reference = dict(_library._ORDER[operator]["CPU"])["reference"]

    def leaves(self) -> list[torch.Tensor]:
        return [x.clone().requires_grad_() for x in self.tensors]

    def loss(self, *tensors: torch.Tensor, run=None) -> torch.Tensor:
        arguments = list(self.arguments)
        for i, tensor in zip(self.indices, tensors, strict=True):
            arguments[i] = tensor
        outputs = (run or self.overload)(*arguments)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        if self.operator in ONE_DIFFERENTIABLE:
            outputs = outputs[:1]
        return sum(y.float().square().sum() for y in outputs)

    def truth(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The same through the reference as plain PyTorch."""
        return self.loss(*tensors, run=self.reference)


@pytest.fixture(autouse=True)
def exact(request):
    """The CPU's kernels of these round x to eight bits, which their own tests allow for."""
    callspec = getattr(request.node, "callspec", None)
    operator = callspec and callspec.params.get("operator")
    rounds = operator in ("linear_int8", "linear_int4")
    with kernels.prefer(operator, "reference") if rounds else nullcontext():
        yield


def gradients(loss, leaves, **options) -> list[torch.Tensor]:
    found = torch.autograd.grad(loss, leaves, allow_unused=True, **options)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def second_gradients(function, leaves) -> list[torch.Tensor]:
    """Of the squared norm of the gradient."""
    first = gradients(function(*leaves), leaves, create_graph=True)
    return gradients(sum(g.float().square().sum() for g in first), leaves)


def assert_near(actual, expected) -> None:
    """The same sums in another order: some roundings apart, of all values together."""
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        roundings = 16 * torch.finfo(ours.dtype).eps
        assert (ours - theirs).norm() <= roundings * theirs.norm() + 1e-30


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of PyTorch's vmap
@pytest.mark.parametrize("operator", OPERATORS)
class TestEveryOperator:
    def test_backward_twice_gives_the_same_bits(self, operator):
        case = Case(operator)
        leaves = case.leaves()
        loss = case.loss(*leaves)
        first, second = (gradients(loss, leaves, retain_graph=True) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
        assert_near(first, gradients(case.truth(*leaves), leaves))

    def test_create_graph(self, operator):
        case = Case(operator)
        expected = second_gradients(case.truth, case.leaves())
        assert_near(second_gradients(case.loss, case.leaves()), expected)

    def test_torch_func(self, operator):
        """grad, grad of grad, vmap, and both ways of joining vmap and grad."""
        case = Case(operator)
        found = grad(case.loss, case.every)(*case.tensors)
        assert_near(found, grad(case.truth, case.every)(*case.tensors))

        def squared(*tensors):
            return sum(g.float().square().sum() for g in grad(case.loss, case.every)(*tensors))

        twice = grad(squared, case.every)(*case.tensors)
        assert_near(twice, second_gradients(case.truth, case.leaves()))
        pairs = [torch.stack((x, x / 2)) for x in case.tensors]
        each = [case.loss(*tensors) for tensors in zip(*pairs, strict=True)]
        assert_near([vmap(case.loss)(*pairs)], [torch.stack(each)])
        by_row = vmap(grad(case.loss, case.every))(*pairs)
        assert_near([g[0] for g in by_row], found)
        whole = grad(lambda *x: vmap(case.loss)(*x).sum(), case.every)(*pairs)
        assert_near(whole, by_row)

    def test_forward_mode_is_an_error_and_not_zeros(self, operator):
        case = Case(operator)
        error = pytest.raises(NotImplementedError, match=r"\w+: no forward-mode derivative")
        with error:
            jvp(case.loss, tuple(case.tensors), tuple(case.tensors))
        with error:
            hessian(lambda x: case.loss(x, *case.tensors[1:]))(case.tensors[0])
        with error, forward_ad.dual_level():
            leaf, *rest = case.leaves()
            case.loss(forward_ad.make_dual(leaf, leaf.detach()), *rest)


def test_torch_func_of_attention_that_was_not_told_of_a_gradient():
    """Inside vmap a tensor does not show that a gradient will be asked for outside."""
    q, k, v = torch.randn(3, 2, 2, 2, 9, 16)
    norms = torch.rand(2, 32)

    def attend(q, k, v):
        return kernels.attention(q, k, v, "causal").square().sum()

    def normed(q, k, v):
        qkv = torch.stack((q, k, v), 2).transpose(1, 3)
        return kernels.qk_norm_attention(qkv, *norms).square().sum()

    for function in (attend, normed):
        found = grad(lambda *x, run=function: vmap(run)(*x).sum(), (0, 1, 2))(q, k, v)
        for row in range(2):
            assert_near([g[row] for g in found], grad(function, (0, 1, 2))(q[row], k[row], v[row]))


class Wrapper(torch.Tensor):
    """A tensor without storage, as torchao's quantized ones: it knows one operator."""

    @staticmethod
    def __new__(cls, inner, calls):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device,
            requires_grad=inner.requires_grad,
        )  # fmt: skip

    def __init__(self, inner, calls):
        self.inner, self.calls = inner.detach(), calls

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        wrapper = next(x for x in args if isinstance(x, cls))
        wrapper.calls.append(function.name())
        if "detach" in function.name():
            return cls(wrapper.inner, wrapper.calls)
        if function not in (
            torch.ops.internvl.linear.default, torch.ops.internvl.linear_backward.default,
        ):  # fmt: skip
            raise NotImplementedError(f"Wrapper has no {function.name()}")
        return function(*(x.inner if isinstance(x, cls) else x for x in args), **(kwargs or {}))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("epilogue", ["none", "gelu"])
def test_linear_reaches_the_dispatch_of_a_weight_that_is_a_subclass(mode, epilogue):
    calls, dense = [], torch.randn(6, 8)
    weight = torch.nn.Parameter(Wrapper(dense, calls), requires_grad=False)
    assert isinstance(weight, Wrapper)
    x = torch.randn(3, 8, requires_grad=True)
    calls.clear()
    with mode():
        y = kernels.linear(x, weight, torch.ones(6), epilogue)
        assert calls == ["internvl::linear"]
        torch.testing.assert_close(y, kernels.linear(x, dense, torch.ones(6), epilogue))
    if mode is torch.enable_grad:
        (found,) = torch.autograd.grad(y.square().sum(), x)
        expected = kernels.linear(x, dense, torch.ones(6), epilogue).square().sum()
        assert_near([found], torch.autograd.grad(expected, x))


@pytest.mark.parametrize("operator", sorted(set(examples()) - {"linear", "linear_backward"}))
@pytest.mark.parametrize("requires_grad", [False, True])
def test_no_operator_reads_the_address_of_a_tensor_without_storage(operator, requires_grad):
    """It asks the tensor's class, which here refuses; reading address 0 would end the process."""
    arguments = list(examples()[operator])
    call = getattr(torch.ops.internvl, operator).default
    for i, x in enumerate(arguments):
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            needs = requires_grad and operator not in WITHOUT_GRADIENT
            wrapped = Wrapper(x.requires_grad_(needs), [])
            with pytest.raises(NotImplementedError, match=f"Wrapper has no internvl::{operator}"):
                call(*arguments[:i], wrapped, *arguments[i + 1 :])
