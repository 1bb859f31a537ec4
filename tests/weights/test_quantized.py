"""A quantized weight is a tensor: read, written, copied, moved, compiled, and frozen."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from internvl_engine.weights import (
    KINDS,
    QuantizedTensor,
    WeightTensor,
    assemble,
    linear,
    merge,
    put,
    quantized_entries,
)

# The largest error of a value, of its row's (its group's) largest one: half a step; int4 clips at
# 0.8 of it, and at 7 / 8 of that on the other side; three bits behind fp8's leading one are 1 / 16.
STEPS = {"int8": 0.5 / 127, "int4": 0.3, "fp8": 1 / 16}
OPTIONS = [("int8", {}), ("int4", {"group": 64}), ("int4", {"group": 128}), ("fp8", {})]
SHAPE = (70, 200)  # no whole panels, steps or groups


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def values(request):
    return torch.randn(SHAPE, dtype=request.param)


@pytest.fixture(params=OPTIONS, ids=lambda each: "-".join(map(str, (each[0], *each[1].values()))))
def form(request):
    return request.param


@pytest.fixture
def weight(values, form):
    kind, options = form
    return nn.Parameter(KINDS[kind].quantize(values, **options), requires_grad=False)


def bits(weight):
    return [each.view(torch.uint8) for each in weight.inner_tensors().values()]


def same_bits(one, other):
    pairs = zip(bits(one), bits(other), strict=True)
    return type(one) is type(other) and all(torch.equal(a, b) for a, b in pairs)


def test_every_value_is_within_a_step(weight, values, form):
    kind, _ = form
    error = (weight.dense().float() - values.float()).abs()
    largest = values.float().abs().amax(1, keepdim=True)
    rounding = torch.finfo(values.dtype).eps + 2.0**-11  # of the values read, and int4's scales
    assert (error <= largest * (STEPS[kind] + rounding)).all()
    assert error.max() > 0


def test_it_says_what_it_is(weight, values, form):
    kind, options = form
    assert isinstance(weight, nn.Parameter) and isinstance(weight, WeightTensor)
    assert (weight.shape, weight.dtype, weight.numel()) == (SHAPE, values.dtype, values.numel())
    assert weight.nbytes == sum(each.nbytes for each in bits(weight)) < values.float().nbytes / 2
    assert repr(weight) == f"{type(weight).__name__}({SHAPE}, {values.dtype})"
    layout = KINDS[kind].inner_layout(SHAPE, **options)
    assert {k: (tuple(x.shape), x.dtype) for k, x in weight.inner_tensors().items()} == layout


READS = {
    "sum": lambda w: w.sum(),
    "float64": lambda w: w.double(),
    "product": lambda w: w @ w.t(),
    "rows": lambda w: F.embedding(torch.tensor([[3, 1, 69], [40, 3, 0]]), w),
    "one row": lambda w: F.embedding(torch.tensor(5), w),
    "no rows": lambda w: F.embedding(torch.empty(0, 2, dtype=torch.int64), w),
    "slice": lambda w: w[5:9, 3].clone(),
    "take": lambda w: torch.take(w.detach(), torch.tensor([[3, -1], [-70, 399]])),
    "lists": lambda w: torch.tensor(w.tolist()),
    "clone": lambda w: w.clone(),
}


@pytest.mark.parametrize("how", READS)
def test_what_is_read_are_the_values(weight, how):
    found, expected = READS[how](weight), READS[how](weight.dense())
    assert type(found) is torch.Tensor and found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,)], ids=str)
def test_any_linear_multiplies_with_it(weight, values, bias, shape):
    module = nn.Linear(*reversed(SHAPE), bias=bias, dtype=values.dtype)
    put(module, "weight", weight.detach())
    x = torch.randn(*shape, SHAPE[1], dtype=values.dtype, requires_grad=True)
    found = module(x)
    expected = F.linear(x.detach(), weight.dense(), module.bias)
    # Activations of 8 bits: half a step of a row's largest value, twice to be sure.
    assert (found - expected).norm() <= 0.02 * expected.norm()
    assert found.dtype == values.dtype and found.shape == (*shape, SHAPE[0])
    gradient = torch.randn_like(found)
    found.backward(gradient)
    exact = (gradient.double().flatten(0, -2) @ weight.dense().double()).view(x.shape)
    assert (x.grad - exact).norm() <= 4 * torch.finfo(values.dtype).eps * exact.norm()
    if bias and shape != (0,):
        exact = gradient.double().flatten(0, -2).sum(0)
        error = (module.bias.grad - exact).norm()
        assert error <= 4 * torch.finfo(values.dtype).eps * exact.norm()
    assert weight.grad is None


@torch.no_grad()
def test_what_is_written_is_rounded_again(weight, form):
    kind, options = form
    other = torch.randn(SHAPE, dtype=weight.dtype)
    weight.copy_(other)
    assert same_bits(weight.detach(), KINDS[kind].quantize(other, **options))
    weight.data[3].zero_()
    assert (weight.dense()[3] == 0).all() and (weight.dense()[4] != 0).any()
    before = weight.dense()
    weight.mul_(2)  # a power of two: only scales change
    assert torch.equal(weight.dense(), before * 2)


def test_bits_of_the_same_form_are_taken_as_they_are(weight, form):
    kind, options = form
    other = KINDS[kind].quantize(torch.randn(SHAPE), **options)
    with torch.no_grad():
        weight.copy_(other)
    assert same_bits(weight.detach(), other) and weight.packed is not other.packed


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
}


def saved(x):
    torch.save(x, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", [*COPIES, "torch.save"])
def test_a_copy_has_the_form_and_shares_nothing(weight, how):
    copied = COPIES.get(how, saved)(weight)
    assert isinstance(copied, nn.Parameter) and same_bits(copied, weight)
    assert copied.dtype == weight.dtype and not copied.requires_grad
    before = weight.dense()
    with torch.no_grad():
        copied.zero_()
    assert torch.equal(weight.dense(), before)
    view = weight.detach()
    assert same_bits(COPIES.get(how, saved)(view), view) and not isinstance(view, nn.Parameter)


def test_another_dtype_is_one_to_compute_in(values, form):
    kind, options = form
    module = nn.Linear(*reversed(SHAPE), dtype=values.dtype)
    put(module, "weight", KINDS[kind].quantize(values, **options))
    held, before = module.weight, bits(module.weight)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        module.to(dtype)
        assert module.weight is held and held.dtype == module.bias.dtype == dtype
        assert all(a is b or torch.equal(a, b) for a, b in zip(bits(held), before, strict=True))
        assert module(torch.randn(2, SHAPE[1], dtype=dtype)).dtype == dtype
    module.double()  # the operators do not compute in it: the weight becomes the values
    assert type(module.weight) is nn.Parameter and module.weight.dtype == torch.float64


def test_it_is_frozen(weight):
    for demand in (
        lambda: weight.requires_grad_(),
        lambda: nn.Parameter(weight.detach()),
        lambda: nn.ParameterList([weight]).requires_grad_(),
    ):
        with pytest.raises(RuntimeError, match="quantized weight is a constant"):
            demand()
    assert weight.requires_grad_(False) is weight and not weight.requires_grad


def test_a_parameter_of_a_module_stays_the_object(values, form):
    kind, options = form
    module = nn.Linear(*reversed(SHAPE), dtype=values.dtype)
    held = module.weight
    held.flag = "kept"
    held.grad = torch.zeros_like(held)
    put(module, "weight", KINDS[kind].quantize(values, **options))
    assert module.weight is held and held.flag == "kept"
    assert isinstance(held, QuantizedTensor) and not held.requires_grad and held.grad is None
    put(module, "weight", values, requires_grad=True)
    assert module.weight is held and type(held) is nn.Parameter and held.requires_grad
    assert torch.equal(held, values)
    assert not module._state_dict_hooks and not module._load_state_dict_pre_hooks


def test_a_state_dict_is_wide_and_the_entries_are_the_bits(weight, values):
    module, other = (nn.Sequential(nn.Linear(*reversed(SHAPE), dtype=values.dtype)) for _ in "ab")
    for each in (module, other):
        put(each[0], "weight", weight.detach().copied())
    state = module.state_dict()
    assert type(state["0.weight"]) is torch.Tensor
    assert torch.equal(state["0.weight"], weight.dense())
    assert module.state_dict(keep_vars=True)["0.weight"] is module[0].weight
    plain = nn.Sequential(nn.Linear(*reversed(SHAPE), dtype=values.dtype))
    plain.load_state_dict(state)
    assert torch.equal(plain[0].weight, weight.dense())
    with torch.no_grad():
        other[0].weight.zero_()
    entries = quantized_entries("0.weight", module[0].weight)
    other.load_state_dict(entries | {"0.bias": state["0.bias"]})
    assert same_bits(other[0].weight, weight)
    other.load_state_dict({"0.weight": values, "0.bias": state["0.bias"]})
    assert same_bits(other[0].weight, type(weight).quantize(values, **weight.options))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    assert type(copied.state_dict()["0.weight"]) is torch.Tensor
    assert same_bits(copied[0].weight, weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "given, missing", [([""], "scales"), (["", ".sums"], "scales"), ([".scales"], "packed")]
)
def test_entries_that_are_incomplete_say_what_is_missing(kind, given, missing):
    """Also fp8's alone, which have the shape of wide values."""
    module = nn.Sequential(nn.Linear(64, 64, bias=False))
    put(module[0], "weight", KINDS[kind].quantize(module[0].weight))
    weight = module[0].weight.detach().copied()
    names = [f"0.weight{each}" for each in given]
    entries = quantized_entries("0.weight", weight)
    with pytest.raises(ValueError, match=f"^0.weight: a quantized weight .*: missing {missing}"):
        module.load_state_dict({name: entries[name] for name in names if name in entries})
    assert same_bits(module[0].weight, weight)


def test_inner_tensors_become_the_weight_that_they_are(weight, form):
    inner = weight.inner_tensors()
    found = assemble(inner, SHAPE, torch.bfloat16)
    assert same_bits(found, weight.detach()) and found.packed is weight.packed
    with pytest.raises(ValueError, match=r"a weight \(70, 300\) is"):
        assemble(inner, (70, 300), torch.bfloat16)
    with pytest.raises(ValueError, match="dtype must be one of"):
        assemble(inner, SHAPE, torch.float64)
    with pytest.raises(ValueError, match="packed values of"):
        assemble({**inner, "packed": inner["packed"].float()}, SHAPE, torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_neighbours_are_one_product_and_mapped_ones_are_not_copied(kind, tmp_path):
    rows, x = (64, 32, 96), torch.randn(5, 128)
    weights = [KINDS[kind].quantize(torch.randn(n, 128)) for n in rows]
    parts = [nn.Parameter(each, requires_grad=False) for each in weights]
    expected = [each.dense() for each in parts]
    merged = merge(parts)
    assert merged is not None and merged.holds(parts)
    assert torch.equal(merged.whole.dense(), torch.cat(expected))
    assert all(torch.equal(p.dense(), e) for p, e in zip(parts, expected, strict=True))
    together = torch.cat([linear(x, part) for part in parts], 1)
    assert torch.equal(linear(x, merged.whole), together)
    addresses = [each.data_ptr() for each in merged.whole.inner_tensors().values()]
    again = merge(parts)  # they lie so already
    assert [each.data_ptr() for each in again.whole.inner_tensors().values()] == addresses
    with torch.no_grad():
        parts[1].zero_()
    assert torch.equal(merged.whole.dense()[64:96], torch.zeros(32, 128))
    assert not merged.holds([parts[0], nn.Parameter(weights[1], False), parts[2]])


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_that_do_not_fit_stay_apart(kind):
    def parts(*shapes, dtypes=(torch.float32, torch.float32)):
        return [
            nn.Parameter(KINDS[kind].quantize(torch.randn(shape, dtype=dtype)), False)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]

    assert (merge(parts((40, 128), (32, 128))) is None) == (kind != "fp8")  # half a panel
    assert merge(parts((64, 128), (40, 128))) is not None  # which may be the last one
    assert merge(parts((64, 128), (64, 96))) is None
    assert merge(parts((64, 128), (64, 128), dtypes=(torch.float32, torch.bfloat16))) is None
    mixed = parts((64, 128), (64, 128))
    assert merge([mixed[0], nn.Parameter(torch.randn(64, 128))]) is None


@pytest.mark.parametrize("wrong", [-1, -200, 70, 95, 10**6])
def test_rows_that_are_not_there_are_refused_as_a_wide_table_refuses_them(weight, wrong):
    """Also those that panels have beyond the last one."""
    for ids in (torch.tensor([[0, wrong]]), torch.tensor([wrong], dtype=torch.int32)):
        for table in (weight.dense(), weight):
            with pytest.raises(IndexError, match="index out of range in self"):
                F.embedding(ids, table)
    ids = torch.tensor([[0, 69]], dtype=torch.int32)
    assert torch.equal(F.embedding(ids, weight), weight.dense()[ids])


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_code_sees_the_inner_tensors(kind):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(96, 64), nn.Linear(64, 96, bias=False)
            self.inner = nn.Linear(64, 64)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(F.gelu(self.inner(self.table(ids))))

    model, ids = Tied(), torch.randint(0, 96, (2, 5))
    for module in (model.table, model.inner):
        put(module, "weight", KINDS[kind].quantize(module.weight))
    assert model.head.weight is model.table.weight
    expected = model(ids)
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(ids)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    gradient = torch.autograd.grad(expected.sum(), model.inner.bias)[0]
    assert torch.equal(torch.autograd.grad(found.sum(), model.inner.bias)[0], gradient)
