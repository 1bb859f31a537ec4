import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from internvl_engine import kernels
from internvl_engine.fused.projection import PackedLinear, Projection, state_of

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


def near(actual, expected):
    # The product of another blocking: a few roundings of sums of 64.
    tolerance = 8 * torch.finfo(expected.dtype).eps
    assert (actual - expected).norm() <= tolerance * expected.norm()


@torch.no_grad()
def test_two_linears_are_one_product_and_their_weights_one_storage(owner, dtype):
    x = torch.randn(5, 64, dtype=dtype)
    expected, state = owner(x), copy.deepcopy(owner.state_dict())
    pair = Projection(owner, *NAMES, inference=True)
    near(pair(x), expected)
    if kernels.can_pack(torch.empty(64, 64, dtype=dtype)):
        assert all(isinstance(linear, PackedLinear) for linear in pair.linears())
        assert len({id(linear.packed.pack) for linear in pair.linears()}) == 1
    else:
        first, second = (linear.weight for linear in pair.linears())
        assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert all(torch.equal(t, state[name]) for name, t in owner.state_dict().items())
    near(owner(x), expected)  # the modules themselves still work
    near(pair(x), expected)  # and are put together again
    pair.release()
    assert all(type(linear) is nn.Linear for linear in pair.linears())
    assert all(torch.equal(t, state[name]) for name, t in owner.state_dict().items())


@pytest.mark.parametrize("epilogue", ["none", "gelu", "swiglu"])
@pytest.mark.parametrize("inference", [False, True])
@torch.no_grad()
def test_epilogues_are_those_of_the_modules(owner, dtype, epilogue, inference):
    x = torch.randn(5, 64, dtype=dtype)
    y = owner(x)
    gate, up = y.chunk(2, -1)
    expected = {"none": y, "gelu": nn.functional.gelu(y)}.get(
        epilogue, nn.functional.silu(gate) * up
    )
    residual = torch.randn_like(expected)
    pair = Projection(owner, *NAMES, inference=inference)
    near(pair(x, epilogue, residual), residual + expected)


@torch.no_grad()
def test_whoever_takes_a_weight_may_change_it(owner, dtype):
    x = torch.randn(5, 64, dtype=dtype)
    pair = Projection(owner, *NAMES, inference=True)
    before = pair(x)
    owner.second.weight.data.mul_(2)  # as a LoRA merge does
    changed = pair(x)
    assert (changed - before).norm() > 0.1 * before.norm()
    near(changed, owner(x))
    states = [state_of(linear) for linear in pair.linears()]
    owner.second.weight.mul_(2)
    pair(x)
    assert [state_of(linear) for linear in pair.linears()] != states


@pytest.mark.parametrize("how", ["in place", "data", "new", "none", "given"])
@torch.no_grad()
def test_a_bias_is_looked_up_at_every_call(owner, dtype, how):
    x = torch.randn(5, 64, dtype=dtype)
    pair = Projection(owner, *NAMES, inference=True)
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
    pair = Projection(owner, *NAMES, inference=True)
    pair(torch.randn(5, 64, dtype=dtype))
    assert dict(owner.named_modules()) == modules
    pair.release()
    assert dict(owner.named_modules()) == modules
    assert [id(p) for p in owner.parameters()] == parameters


@torch.no_grad()
def test_a_state_is_of_one_weight_and_keeps_none_alive(owner, dtype):
    pair = Projection(owner, *NAMES, inference=True)
    pair.prepare()
    states = [state_of(owner.first)]
    assert states[0] == state_of(owner.first)
    for _ in range(20):  # memory is given out again
        owner.first.weight = nn.Parameter(torch.randn(32, 64, dtype=dtype))
        pair.prepare()
        states.append(state_of(owner.first))
    assert all(states.count(state) == 1 for state in states)
    whose = weakref.ref(owner.first.packed.pack if pair_is_packed(pair) else owner.first.weight)
    del owner.first, owner.second, pair
    gc.collect()
    assert whose() is None


def pair_is_packed(pair):
    return all(isinstance(linear, PackedLinear) for linear in pair.linears())


@torch.no_grad()
def test_a_wrapped_or_hooked_linear_is_called(owner, dtype):
    x = torch.randn(5, 64, dtype=dtype)
    pair = Projection(owner, *NAMES, inference=True)
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
    pair = Projection(owner, *NAMES, inference=True)
    pair.prepare()
    for name in asked:
        owner.get_submodule(name).weight.mul_(2)  # unpacks it
    kinds = [type(linear) for linear in pair.linears()]
    torch._dynamo.reset()
    found = torch.compile(pair, backend="eager", fullgraph=True)(x)
    assert [type(linear) for linear in pair.linears()] == kinds
    near(found, owner(x))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_one_of_two_may_be_wrapped_where_they_are_packed(owner, dtype, name):
    x = torch.randn(5, 64, dtype=dtype)
    pair = Projection(owner, *NAMES, inference=True)
    expected = dict(zip(NAMES, pair(x).split((32, 96), -1), strict=True))
    setattr(owner, name, nn.Sequential(getattr(owner, name), nn.ReLU()))
    expected[name] = expected[name].relu()
    near(pair(x), torch.cat([expected[each] for each in NAMES], -1))


def test_a_gradient_reaches_the_weights_in_training(owner, dtype):
    x = torch.randn(5, 64, dtype=dtype, requires_grad=True)
    Projection(owner, *NAMES, inference=False)(x).sum().backward()
    near(owner.first.weight.grad, x.detach().sum(0).expand(32, 64))
