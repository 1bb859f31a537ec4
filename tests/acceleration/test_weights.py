"""Whose the weights of an accelerated model are: changed, assigned, shared, trained and counted."""

import copy
import io
import pickle

import pytest
import torch
from tensor_bytes import tensor_bytes
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call

from internvl_engine import accelerate, kernels
from internvl_engine.weights import WeightTensor

from models import decoder, model, pixels

FC1 = "vision_model.encoder.layers.0.mlp.fc1"
K = "qllama.model.layers.0.self_attn.k_proj"
# float64 has no packed layout anywhere: its q, k, v are merged, as on a GPU.
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(params=DTYPES, ids=["packed", "merged"])
def built(request):
    return model().to(request.param)


@pytest.fixture
def x(built):
    return pixels(2).to(built.dtype)


@torch.no_grad()
def run(built, x):
    return built.get_image_features(x)[1]


def assert_like_its_state(built, x):
    """The outputs are those of an eager model with the same state."""
    eager = model().to(built.dtype)
    eager.load_state_dict(built.state_dict())
    expected = run(eager, x)
    # Relative norm; fp32 paths of other order differ by 1e-6 here.
    assert (run(built, x) - expected).norm() <= 1e-5 * expected.norm()


def num_packed(built):
    return sum(isinstance(p, WeightTensor) for p in built.parameters())


def packs(dtype):
    return kernels.layout_of(torch.empty(64, 64, dtype=dtype)) is not None


def new(parameter):
    return nn.Parameter(torch.randn_like(parameter) * 0.3)


@pytest.mark.parametrize("name", [f"{FC1}.weight", f"{FC1}.bias", f"{K}.weight"])
@pytest.mark.parametrize("how", ["in place", "data", "new"])
def test_a_changed_parameter_is_used_and_saved(built, x, name, how):
    accelerate(built)
    before = run(built, x)
    owner, _, attribute = name.rpartition(".")
    owner = built.get_submodule(owner)
    values = new(getattr(owner, attribute)).data
    if how == "new":
        setattr(owner, attribute, nn.Parameter(values.clone()))
    elif how == "data":
        getattr(owner, attribute).data = values.clone()
    else:
        with torch.no_grad():
            getattr(owner, attribute).copy_(values)
    assert torch.equal(built.state_dict()[name], values)
    assert_like_its_state(built, x)
    assert (run(built, x) - before).norm() > 1e-3 * before.norm()
    assert torch.equal(built.state_dict()[name], values)


@pytest.mark.parametrize("called", [False, True])
def test_undo_keeps_what_was_assigned(built, x, called):
    report = accelerate(built)
    state = {name: torch.randn_like(tensor) for name, tensor in built.state_dict().items()}
    built.load_state_dict(state, assign=True)
    fc1 = built.get_submodule(FC1)
    fc1.weight, fc1.bias = new(fc1.weight), new(fc1.bias)
    state |= {f"{FC1}.weight": fc1.weight.detach(), f"{FC1}.bias": fc1.bias.detach()}
    if called:
        run(built, x)
    report.undo()
    assert built.get_submodule(FC1) is fc1
    assert all(torch.equal(t, state[name]) for name, t in built.state_dict().items())


@pytest.mark.parametrize("name", [f"{FC1}.weight", f"{K}.weight"])
def test_a_weight_that_is_missing_in_a_state_is_said(built, x, name):
    accelerate(built)
    state = built.state_dict()
    kept = state.pop(name)
    assert built.load_state_dict(state, strict=False).missing_keys == [name]
    with pytest.raises(RuntimeError, match=name):
        built.load_state_dict(state)
    assert torch.equal(built.state_dict()[name], kept)
    assert_like_its_state(built, x)


def test_what_was_loaded_is_packed_or_merged_before_the_next_call(built, x):
    accelerate(built)
    before = num_packed(built)
    built.load_state_dict(model().to(built.dtype).state_dict())
    assert num_packed(built) == before and bool(before) == packs(built.dtype)
    target = {torch.float32: torch.float64, torch.float64: torch.float32}[built.dtype]
    built.to(target)
    assert bool(num_packed(built)) == packs(target)
    assert_like_its_state(built, x.to(target))


@torch.no_grad()
def test_compiled_code_sees_new_weights(built):
    built = built.qllama
    accelerate(built)
    graphs = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(lambda h: built(inputs_embeds=h), backend=graphs)
    for batch in (2, 3, 5):
        compiled(torch.randn(batch, 9, 64, dtype=built.dtype))
    embeds = torch.randn(2, 9, 64, dtype=built.dtype)

    def check():
        eager = decoder().to(built.dtype)
        eager.load_state_dict(built.state_dict())
        expected = eager(inputs_embeds=embeds).logits
        assert (compiled(embeds).logits - expected).norm() <= 1e-5 * expected.norm()

    check()
    built.load_state_dict(decoder().to(built.dtype).state_dict())
    check()
    k_proj = built.model.layers[1].self_attn.k_proj
    k_proj.weight = new(k_proj.weight)
    check()
    mlp = built.model.layers[1].mlp
    mlp.down_proj.weight.mul_(2)
    check()


@torch.no_grad()
def test_compiled_layers_run_in_one_graph_after_a_load_and_with_one_new_weight(built):
    tower = built.vision_model
    accelerate(tower)
    x = pixels(2).to(built.dtype)
    graphs = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(tower, fullgraph=True, dynamic=True, backend=graphs)
    for batch in (2, 3, 5):
        compiled(pixels(batch).to(built.dtype))
    assert graphs.frame_count == 1
    packed, other = num_packed(tower), model().to(built.dtype).vision_model
    tower.load_state_dict(other.state_dict())
    assert num_packed(tower) == packed
    for _ in range(2):
        expected = other(x).last_hidden_state
        assert (compiled(x).last_hidden_state - expected).norm() <= 1e-5 * expected.norm()
        for one in (tower, other):
            one.encoder.layers[0].mlp.fc1.weight.mul_(2)


@pytest.mark.parametrize("when", ["before", "after"])
def test_tied_weights_stay_tied(built, x, when):
    head = nn.Linear(48, 96, bias=False, dtype=built.dtype)
    layers = built.vision_model.encoder.layers
    fc1 = layers[0].mlp.fc1
    if when == "after":
        accelerate(built)
    head.weight = layers[1].mlp.fc1.weight = fc1.weight
    if when == "before":
        accelerate(built)
    assert_like_its_state(built, x)
    with torch.no_grad():
        head.weight.mul_(2)
    assert_like_its_state(built, x)
    assert torch.equal(head(torch.eye(48, dtype=built.dtype)), fc1.weight.T)
    assert head.weight is fc1.weight is layers[1].mlp.fc1.weight


def test_parameters_that_somebody_holds_are_those_of_the_model(built, x):
    held, values = dict(built.named_parameters()), copy.deepcopy(built.state_dict())
    report = accelerate(built)
    assert bool(num_packed(built)) == packs(built.dtype)
    run(built, x)
    for when in ("fused", "undone"):
        assert all(held[name] is p for name, p in built.named_parameters()), when
        assert all(torch.equal(p.detach().clone() * 1, values[n]) for n, p in held.items()), when
        report.undo()
    assert all(type(p) is nn.Parameter for p in built.parameters())


def test_functional_call_computes_with_the_weights_it_is_given(built, x):
    other = model().to(built.dtype).vision_model
    accelerate(built)
    tower = built.vision_model
    before, packed = tower(x).last_hidden_state, num_packed(built)
    state = {name: t.clone() for name, t in other.state_dict().items()}
    for weights in (state, {name: nn.Parameter(t) for name, t in state.items()}):
        for given in (weights, {n: t for n, t in weights.items() if "fc1" in n or "layers.1" in n}):
            eager = model().to(built.dtype).vision_model
            eager.load_state_dict(tower.state_dict())
            expected = functional_call(eager, given, (x,)).last_hidden_state
            found = functional_call(tower, given, (x,)).last_hidden_state
            assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert all(torch.equal(t, state[name]) for name, t in weights.items())
    assert (tower(x).last_hidden_state - before).norm() <= 1e-6 * before.norm()
    assert num_packed(built) == packed


def gradients(built, x):
    built.encode_image(x).square().sum().backward()
    return {name: p.grad for name, p in built.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", ["train()", "training"])
def test_weights_are_trained_after_inference(built, x, how):
    eager = copy.deepcopy(built).train()
    accelerate(built)
    run(built, x)
    if how == "training":
        report = accelerate(built, "training")
        assert "fused for training" in str(report)
        assert {entry.reason for entry in report.entries} == {
            "already fused, for training from now on"
        }
    built.train()
    expected, found = gradients(eager, x), gradients(built, x)
    assert found.keys() == expected.keys() and len(found) > 50
    assert dict(built.named_parameters()).keys() == dict(eager.named_parameters()).keys()
    total = torch.stack([g.norm() for g in expected.values()]).norm()
    error = torch.stack([(found[n] - expected[n]).norm() for n in found]).norm()
    assert error <= 1e-5 * total
    built.eval()
    assert bool(num_packed(built)) == (packs(built.dtype) and how == "train()")
    accelerate(built)
    assert bool(num_packed(built)) == packs(built.dtype)
    assert_like_its_state(built, x)


def test_an_optimizer_trains_what_is_evaluated_in_between(built, x):
    accelerate(built)
    optimizer = torch.optim.SGD(built.train().parameters(), 0.1)
    gradients(built, x)
    for _ in range(2):
        before = run(built.eval(), x)
        optimizer.step()
        assert (run(built, x) - before).norm() > 1e-6 * before.norm()
        assert_like_its_state(built, x)


def test_every_weight_is_among_the_parameters(built):
    names, count = list(dict(built.named_parameters())), built.num_parameters()
    accelerate(built)
    assert list(dict(built.named_parameters())) == names and built.num_parameters() == count
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in built.parameters())
    built.requires_grad_(False)
    assert not any(p.requires_grad for p in built.train().parameters())
    assert not any(p.requires_grad for p in built.eval().parameters())


@pytest.mark.parametrize("how", ["state_dict", "train", "undo"])
def test_no_two_weights_share_memory(built, how):
    report = accelerate(built)
    if how == "train":
        built.train()
    elif how == "undo":
        report.undo()
    tensors = built.state_dict() if how == "state_dict" else dict(built.named_parameters())
    assert all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in tensors.values())
    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    sizes = zip(storages, tensors.values(), strict=True)
    assert all(storage.nbytes() == tensor.nbytes for storage, tensor in sizes)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_have_the_weights_once_and_of_their_own(built, x, way):
    accelerate(built)
    expected, packed = run(built, x), num_packed(built)
    if way == "deepcopy":
        copied = copy.deepcopy(built)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(built))
    else:
        file = io.BytesIO()
        torch.save(built, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    with torch.no_grad():
        built.get_submodule(FC1).weight.zero_()
    assert (run(copied, x) - expected).norm() <= 1e-6 * expected.norm()
    assert num_packed(copied) == packed
    before, weights = tensor_bytes(), sum(p.nbytes for p in built.parameters())
    del copied
    assert before - tensor_bytes() <= 1.1 * weights
