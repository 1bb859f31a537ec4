"""Linears with the same input as one product: forms, epilogues, changes, copies, gradients."""

import copy

import pytest
import torch
from torch import nn

from internvl_engine import kernels
from internvl_engine.weights import Linears, WeightTensor

NAMES = ("first", "second")
DTYPES = [torch.float32, torch.bfloat16, torch.float64]  # float64 has no packed layout


class Owner(nn.Module):
    def __init__(self, dtype, bias):
        super().__init__()
        self.first, self.second = (
            nn.Linear(64, width, bias=bias, dtype=dtype) for width in (32, 96)
        )

    def forward(self, x):
        return torch.cat((self.first(x), self.second(x)), -1)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["", "bias"])
def owner(dtype, request):
    return Owner(dtype, request.param)


class Pair:
    """Linears of one owner."""

    def __init__(self, owner, **options):
        self.owner, self.group = owner, Linears(*NAMES, **options)

    def __call__(self, *args):
        return self.group(self.owner, *args)

    def prepare(self):
        self.group.prepare(self.owner)
        return self

    def restore(self):
        self.group.restore(self.owner)

    def linears(self):
        return self.group.linears(self.owner)


def prepared(owner):
    return Pair(owner).prepare()


def is_packed(owner):
    return [isinstance(owner.get_submodule(name).weight, WeightTensor) for name in NAMES]


def near(actual, expected):
    # The product of another blocking: a few roundings of sums of 64.
    tolerance = 8 * torch.finfo(expected.dtype).eps
    assert (actual - expected).norm() <= tolerance * expected.norm()


@torch.no_grad()
def test_two_linears_are_one_product_and_their_weights_one_storage(owner, dtype):
    x = torch.randn(5, 64, dtype=dtype)
    expected, state = owner(x), copy.deepcopy(owner.state_dict())
    pair = prepared(owner)
    near(pair(x), expected)
    first, second = (linear.weight for linear in pair.linears())
    layout = kernels.layout_of(torch.empty(64, 64, dtype=dtype))
    assert is_packed(owner) == [layout is not None] * 2
    if layout != "onednn":  # whose tensors are opaque and stay apart
        first, second = (getattr(weight, "packed", weight) for weight in (first, second))
        assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert all(torch.equal(t, state[name]) for name, t in owner.state_dict().items())
    near(owner(x), expected)  # the modules themselves still work
    pair.restore()
    assert all(type(linear.weight) is nn.Parameter for linear in pair.linears())
    assert all(torch.equal(t, state[name]) for name, t in owner.state_dict().items())


@pytest.mark.parametrize("epilogue", ["none", "gelu", "gelu_tanh", "gelu_quick", "swiglu"])
@pytest.mark.parametrize("merged", [False, True])
@torch.no_grad()
def test_epilogues_are_those_of_the_modules(owner, dtype, epilogue, merged):
    x = torch.randn(5, 64, dtype=dtype)
    y = owner(x)
    gate, up = y.chunk(2, -1)
    expected = {
        "none": y,
        "gelu": nn.functional.gelu(y),
        "gelu_tanh": nn.functional.gelu(y, approximate="tanh"),
        "gelu_quick": y * torch.sigmoid(1.702 * y),
        "swiglu": nn.functional.silu(gate) * up,
    }[epilogue]
    residual = torch.randn_like(expected)
    pair = prepared(owner) if merged else Pair(owner)
    near(pair(x, epilogue, residual), residual + expected)


@torch.no_grad()
def test_whoever_takes_a_weight_may_change_it(owner, dtype):
    x = torch.randn(5, 64, dtype=dtype)
    pair = prepared(owner)
    before = pair(x)
    owner.second.weight.data.mul_(2)  # as a LoRA merge does
    changed = pair(x)
    assert (changed - before).norm() > 0.1 * before.norm()
    near(changed, owner(x))
    owner.second.weight[3:5] = 1  # through a view
    near(pair(x), owner(x))
    near(owner(x)[:, 35], x.sum(-1) + (0 if owner.second.bias is None else owner.second.bias[3]))


@pytest.mark.parametrize("how", ["in place", "data", "new", "none", "given"])
@torch.no_grad()
def test_a_bias_is_looked_up_at_every_call(owner, dtype, how):
    x = torch.randn(5, 64, dtype=dtype)
    pair = prepared(owner)
    pair(x)
    bias = torch.randn(96, dtype=dtype)
    if owner.second.bias is None or how == "new":
        owner.second.bias = nn.Parameter(bias)
    elif how == "in place":
        owner.second.bias.copy_(bias)
    elif how == "data":
        owner.second.bias.data = bias
    elif how == "none":
        owner.second.bias = None
    else:
        owner.second._parameters["bias"] = bias
    found = pair(x)
    near(found, pair(x))
    near(found, owner(x))
    second = copy.deepcopy(owner.second)
    near(found[:, 32:], nn.functional.linear(x, second.weight, second.bias))


@torch.no_grad()
def test_a_module_stays_the_one_it_was(owner, dtype):
    modules = dict(owner.named_modules())
    parameters = [id(p) for p in owner.parameters()]
    pair = prepared(owner)
    pair(torch.randn(5, 64, dtype=dtype))
    assert dict(owner.named_modules()) == modules
    pair.restore()
    assert dict(owner.named_modules()) == modules
    assert [id(p) for p in owner.parameters()] == parameters


@torch.no_grad()
def test_a_wrapped_or_hooked_linear_is_called(owner, dtype):
    x = torch.randn(5, 64, dtype=dtype)
    pair = prepared(owner)
    expected = pair(x)
    calls = []
    handle = owner.first.register_forward_hook(lambda *_: calls.append(1))
    near(pair(x), expected)
    assert calls == [1]
    handle.remove()
    owner.second = nn.Sequential(owner.second, nn.ReLU())
    near(pair(x)[:, 32:], expected[:, 32:].relu())


@pytest.mark.parametrize("asked", [(), ("first",), ("second",), NAMES])
@torch.no_grad()
def test_compiled_code_takes_the_weights_as_they_are(owner, dtype, asked):
    x = torch.randn(5, 64, dtype=dtype)
    pair = prepared(owner)
    for name in asked:
        linear = owner.get_submodule(name)
        linear.weight = nn.Parameter(torch.randn(linear.weight.shape, dtype=dtype))
    forms = is_packed(owner)
    torch._dynamo.reset()
    found = torch.compile(pair, backend="eager", fullgraph=True)(x)
    assert is_packed(owner) == forms
    near(found, owner(x))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_one_of_two_may_be_wrapped_where_they_are_packed(owner, dtype, name):
    x = torch.randn(5, 64, dtype=dtype)
    pair = prepared(owner)
    expected = dict(zip(NAMES, pair(x).split((32, 96), -1), strict=True))
    setattr(owner, name, nn.Sequential(getattr(owner, name), nn.ReLU()))
    expected[name] = expected[name].relu()
    near(pair(x), torch.cat([expected[each] for each in NAMES], -1))


def test_a_gradient_reaches_the_weights_in_training(owner, dtype):
    x = torch.randn(5, 64, dtype=dtype, requires_grad=True)
    Pair(owner)(x).sum().backward()
    near(owner.first.weight.grad, x.detach().sum(0).expand(32, 64))


@pytest.mark.parametrize("merged", [False, True])
def test_a_gradient_reaches_weights_in_every_form(owner, dtype, merged):
    x = torch.randn(5, 64, dtype=dtype, requires_grad=True)
    expected = torch.autograd.grad(owner(x).square().sum(), [*owner.parameters(), x])
    pair = prepared(owner) if merged else Pair(owner)
    found = torch.autograd.grad(pair(x).square().sum(), [*owner.parameters(), x])
    for ours, theirs in zip(found, expected, strict=True):
        # Squares double the outputs' roundings, of sums of up to 128 products.
        assert (ours - theirs).norm() <= 16 * torch.finfo(dtype).eps * theirs.norm()


def test_a_tied_weight_is_left_as_it_is(owner):
    pair = Pair(owner, tied=frozenset({id(owner.second.weight)}))
    pair.prepare()
    assert is_packed(owner) == [False, False]
    storages = {linear.weight.untyped_storage().data_ptr() for linear in pair.linears()}
    assert len(storages) == 2


@torch.no_grad()
def test_a_linear_that_is_gone_is_no_error(owner):
    pair = prepared(owner)
    del owner.second
    pair.prepare()
    pair.restore()
    assert pair.linears() == []


def test_a_weight_that_a_graph_holds_is_replaced_where_that_is_asked(owner, dtype):
    pair = prepared(owner)
    y = pair(torch.randn(2, 64, dtype=dtype, requires_grad=True))
    weight = owner.first.weight
    pair.restore()
    assert owner.first.weight is weight
    pair.group.restore(owner, replace=True)
    assert type(owner.first.weight) is nn.Parameter
    y.sum().backward()  # of the weight that was there
    assert weight.grad is not None
