"""A weight in a form of its own is a tensor: read, written, copied, trained and compiled."""

import copy
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from internvl_engine import kernels
from internvl_engine.weights import PackedTensor, linear
from internvl_engine.weights.tensor import swap

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16)
          if kernels.layout_of(torch.empty(64, 64, dtype=dtype))]  # fmt: skip
if not DTYPES:
    pytest.skip("this machine has no packed layout", allow_module_level=True)


@pytest.fixture(params=DTYPES, ids=str)
def values(request):
    return torch.randn(96, 64, dtype=request.param)


@pytest.fixture
def weight(values):
    return nn.Parameter(PackedTensor(kernels.pack(values), values.shape))


def dense(weight):
    """The values, read by an operator of PyTorch."""
    return weight.detach() + 0


WRITES = {
    "in place": lambda w: w.mul_(2),
    "item": lambda w: w[3].fill_(1),
    "slice of data": lambda w: w.data[3:7].neg_(),
    "view of a view": lambda w: w.view(-1)[5:9].zero_(),
    "transposed": lambda w: w.t().mul_(3),
    "chunk": lambda w: w.chunk(3)[1].add_(1),
    "mask": lambda w: w.masked_fill_(w > 0, 0.5),
    "index": lambda w: w.__setitem__((torch.tensor([1, 2]), torch.tensor([0, 5])), 7.0),
    "copy": lambda w: w.copy_(torch.arange(64.0)),
    "init": lambda w: nn.init.constant_(w, 0.25),
    "data": lambda w: setattr(w, "data", torch.full_like(w, 2)),
    "data +=": lambda w: setattr(w, "data", w.data.add_(1)),
    "lists": lambda w: torch._foreach_mul_([w], 2.0),
    "several views": lambda w: torch._foreach_mul_(list(w.split(32)), 2.0),
    "aliases": lambda w: torch._foreach_add_([w.detach()[0], w.data[1]], 1.0),
}


@pytest.mark.parametrize("how", WRITES)
@torch.no_grad()
def test_what_is_written_is_the_weight(weight, values, how):
    plain, x = nn.Parameter(values.clone()), torch.randn(5, 64, dtype=values.dtype)
    alias = weight.detach()
    for one in (weight, plain):
        WRITES[how](one)
    assert isinstance(weight, PackedTensor) and not torch.equal(plain, values)
    for one in (weight, alias):
        assert torch.equal(dense(one), plain)
    # The product sums in another order: a few roundings of sums of 64.
    error = (linear(x, weight) - F.linear(x, plain)).norm()
    assert error <= 8 * torch.finfo(values.dtype).eps * F.linear(x, plain).norm()


READS = {
    "sum": lambda w: w.sum(),
    "float": lambda w: w.float(),
    "product": lambda w: w @ w.t(),
    "rows": lambda w: F.embedding(torch.tensor([3, 1]), w),
    "stack": lambda w: torch.stack([w, w]),
    "unbind": lambda w: w.unbind(0)[4],
    "clone of a slice": lambda w: w[:5].clone(),
    "empty": lambda w: torch.zeros_like(w),
    "numpy": lambda w: torch.from_numpy(w.detach().float().numpy()),
    "lists": lambda w: torch.tensor(w.detach().tolist()),
    "comparison": lambda w: w == w.clone(),
    "take": lambda w: torch.take(w.detach(), torch.tensor([3, -1, -70])),
    "a view's lists": lambda w: torch.tensor(w.detach()[3].tolist()),
    "a copy of a view": lambda w: copy.deepcopy(w.detach()[3]),
}


@pytest.mark.parametrize("how", READS)
def test_what_is_read_are_the_values(weight, values, how):
    found, expected = READS[how](weight), READS[how](nn.Parameter(values))
    assert torch.equal(dense(found), expected.detach() + 0) and found.dtype == expected.dtype
    assert found.requires_grad == expected.requires_grad


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_plain_and_shares_nothing(weight, values, how):
    if how == "deepcopy":
        copied = copy.deepcopy(weight)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(weight))
    else:
        torch.save(weight, file := io.BytesIO())
        file.seek(0)
        copied = torch.load(file)
    assert type(copied) is nn.Parameter and torch.equal(copied, values)
    with torch.no_grad():
        copied.zero_()
    assert torch.equal(dense(weight), values)


def test_it_says_what_it_is(weight, values):
    assert isinstance(weight, nn.Parameter) and weight.requires_grad and weight.is_leaf
    assert repr(weight) == f"PackedTensor((96, 64), {values.dtype})"
    assert weight.nbytes == kernels.packed_nbytes(weight.packed) >= values.nbytes
    assert weight.numel() == values.numel() and weight.shape == values.shape


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_an_optimizer_trains_it(weight, values, kind):
    x, plain = torch.randn(5, 64, dtype=values.dtype), nn.Parameter(values.clone())
    for one in (weight, plain):
        optimizer = kind([one], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            kernels.linear(x, one).square().sum().backward()
            assert type(one.grad) is torch.Tensor
            optimizer.step()
    assert isinstance(weight, PackedTensor)
    moved = (plain - values).norm()
    assert (dense(weight) - plain).norm() <= 64 * torch.finfo(values.dtype).eps * moved
    assert moved > 0.1


def test_its_form_changes_and_the_object_stays(weight, values):
    seen = []
    weight.flag = "kept"
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    handle = weight.register_hook(lambda gradient: gradient * 2)
    (weight * 1.0).sum().backward()
    gradient, identity = weight.grad, id(weight)
    assert swap(weight, weight.dense())
    assert id(weight) == identity and type(weight) is nn.Parameter and torch.equal(weight, values)
    assert weight.grad is gradient and weight.flag == "kept" and (gradient == 2).all()
    weight.grad = None
    weight.sum().backward()
    assert len(seen) == 2 and seen[1] is weight and (weight.grad == 2).all()
    handle.remove()
    weight.grad = None
    weight.sum().backward()
    assert (weight.grad == 1).all()


def test_what_cannot_change_its_form_stays_right(weight, values):
    watcher = weakref.ref(weight)
    assert not swap(weight, values) and watcher() is weight
    assert isinstance(weight, PackedTensor) and torch.equal(dense(weight), values)


def test_places_that_are_not_there_are_refused(weight):
    with pytest.raises(IndexError, match="6144 values"):
        torch.take(weight.detach(), torch.tensor([6144]))


def test_other_data_is_refused_while_a_graph_holds_it(weight):
    y = weight * 2
    with pytest.raises(RuntimeError, match="a graph that is alive"):
        weight.data = torch.ones(3, 4)
    y.sum().backward()
    assert (weight.grad == 2).all()


def test_it_can_be_shared(weight, values):
    if weight.packed.layout != torch.strided:
        pytest.skip("oneDNN's tensors cannot be shared")
    assert not weight.is_shared() and weight.share_memory_().is_shared()
    assert torch.equal(dense(weight), values)


def test_a_change_between_forward_and_backward_is_refused(weight):
    weight.requires_grad_(False)
    if weight.packed.layout != torch.strided:
        pytest.skip("oneDNN's tensors count no changes")
    x = torch.randn(2, 64, dtype=weight.dtype, requires_grad=True)
    y = linear(x, weight)
    weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_other_data_makes_it_plain(weight):
    weight.data = torch.ones(3, 4, dtype=torch.float64)
    assert type(weight) is nn.Parameter and weight.shape == (3, 4)
    assert weight.dtype == torch.float64


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code_multiplies_with_it(weight, values, backend):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: kernels.linear(x, weight, None, "gelu"), backend=backend, fullgraph=True
    )
    x = torch.randn(5, 64, dtype=values.dtype)
    with torch.no_grad():
        assert torch.equal(compiled(x), linear(x, weight, None, "gelu"))
        weight.mul_(2)
        assert torch.equal(compiled(x), linear(x, weight, None, "gelu"))
    assert torch.equal(dense(weight), values * 2)
