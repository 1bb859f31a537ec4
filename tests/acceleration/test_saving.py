"""Whatever saves, copies or loads an accelerated model finds every weight, under its old name."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from company import KINDS, PAIRS, assert_same_weights, close, eager, put, run, spread
from foreign_towers import composite
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

DTYPES = [torch.float32, torch.bfloat16]


def assert_same_tensors(found, expected):
    """Plain tensors of the same names and bits, none of which shares memory with another."""
    assert found.keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in found.items())


def is_alone(t):
    """Whether a tensor is a plain one, and its storage holds nothing else."""
    assert type(t) in (torch.Tensor, nn.Parameter) and t.layout == torch.strided
    return t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind, state", PAIRS)
def test_a_state_dict_is_of_plain_tensors_that_share_nothing(kind, state, dtype):
    built = eager(kind, dtype)
    expected = copy.deepcopy(built.state_dict())
    found = put(built, state).state_dict()
    assert_same_tensors(found, expected)
    assert all(map(is_alone, found.values()))
    assert len({t.data_ptr() for t in found.values()}) == len(found)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind, state", PAIRS)
def test_every_weight_is_a_parameter_and_stays_the_same_object(kind, state, dtype):
    built = eager(kind, dtype)
    before = dict(built.named_parameters())
    values = {name: p.detach().clone() for name, p in before.items()}
    found = dict(put(built, state).named_parameters())
    assert list(found) == list(before)
    assert all(found[name] is p and isinstance(p, nn.Parameter) for name, p in before.items())
    assert all(p.shape == values[name].shape and p.dtype == dtype for name, p in found.items())
    assert all(torch.equal(p.detach() + 0, values[name]) for name, p in found.items())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_have_storage_of_their_own_where_they_train_and_after_undo(kind):
    for state in ("in train()", "training", "after undo()"):
        parameters = list(put(eager(kind), state).parameters())
        assert all(map(is_alone, (p.data for p in parameters))), state
        assert len({p.data_ptr() for p in parameters}) == len(parameters)


def _torch(built, path):
    torch.save(built.state_dict(), path / "model.pt")
    return torch.load(path / "model.pt", weights_only=True)


def _safetensors(built, path):
    save_file(built.state_dict(), path / "model.safetensors")
    return load_file(path / "model.safetensors")


def _save_model(built, path):
    save_model(built, path / "model.safetensors")
    return load_file(path / "model.safetensors")


def _accelerator(built, path):
    from accelerate import Accelerator

    Accelerator(cpu=True).save_model(built, path)
    return load_file(path / "model.safetensors")


def _accelerator_state(built, path):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(built)
    accelerator.save_state(path)
    return load_file(path / "model.safetensors")


def _hub(built, path):
    from huggingface_hub import save_torch_model

    save_torch_model(built, path)
    return load_file(path / "model.safetensors")


def _distributed(built, path):
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": built.state_dict()}, checkpoint_id=path)
    state = {"model": {name: torch.zeros_like(t) for name, t in built.state_dict().items()}}
    dcp.load(state, checkpoint_id=path)
    return state["model"]


def _by_parameter(built, path):
    named = {**dict(built.named_parameters()), **dict(built.named_buffers())}
    keys = built.state_dict().keys()  # without the buffers that are never saved
    torch.save({name: t.detach().clone() for name, t in named.items() if name in keys}, path / "p")
    return torch.load(path / "p", weights_only=False)


WAYS = {
    "torch.save": _torch,
    "save_file": _safetensors,
    "save_model": _save_model,
    "Accelerator.save_model": _accelerator,
    "Accelerator.save_state": _accelerator_state,
    "save_torch_model": _hub,
    "distributed": _distributed,
    "named_parameters": _by_parameter,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("state", ["inference", "in train()", "after undo()"])
@pytest.mark.parametrize("way", WAYS)
def test_files_have_every_weight(way, state, tmp_path):
    built = eager("chat")
    expected = copy.deepcopy(built.state_dict())
    assert_same_tensors(WAYS[way](put(built, state), tmp_path), expected)


@pytest.mark.parametrize("way", ["save_model", "Accelerator.save_model"])
def test_a_tied_weight_is_saved_once_and_stays_tied(way, state, tmp_path):
    built = spread(composite(tie=True))
    expected = WAYS[way](copy.deepcopy(built), tmp_path)
    put(built, state)
    assert_same_tensors(WAYS[way](built, tmp_path), expected)
    assert built.lm_head.weight is built.get_input_embeddings().weight
    assert len(expected) == len(built.state_dict()) - 1


@pytest.mark.parametrize("kind", ["ours", "chat"])
def test_save_pretrained_is_read_again(kind, state, tmp_path):
    built = eager(kind, torch.bfloat16)
    expected = copy.deepcopy(built.state_dict())
    put(built, state).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(Path(tmp_path).glob("*.safetensors"))) > 1
    read = type(built).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same_tensors(read.state_dict(), expected)


def _copied(built, path):
    return copy.deepcopy(built)


def _pickled(built, path):
    return pickle.loads(pickle.dumps(built))


def _whole(built, path):
    torch.save(built, path / "whole.pt")
    return torch.load(path / "whole.pt", weights_only=False)


COPIES = [(kind, _copied) for kind in KINDS]
for _kind in ("ours", "published"):  # the hooks that transformers leaves cannot be pickled
    COPIES += [(_kind, _pickled), (_kind, _whole)]


@pytest.mark.parametrize("kind, way", COPIES)
@torch.no_grad()
def test_a_copy_computes_the_same_and_shares_nothing(kind, way, state, tmp_path):
    built = eager(kind)
    weights = copy.deepcopy(built.state_dict())
    put(built, state)
    expected = run(built)
    copied = way(built, tmp_path)
    for parameter in built.parameters():
        parameter.zero_()
    assert_same_tensors(copied.state_dict(), weights)
    assert torch.equal(run(copied), expected)
    assert not any(t.any() for name, t in built.state_dict().items() if "inv_freq" not in name)


def _load(built, weights, path):
    built.load_state_dict(weights, strict=True)


def _assign(built, weights, path):
    built.load_state_dict(weights, strict=True, assign=True)


def _load_model(built, weights, path):
    save_file(weights, path / "new.safetensors")
    assert load_model(built, path / "new.safetensors") == (set(), [])


def _copy_into_parameters(built, weights, path):
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.copy_(weights[name])


def _through_data(built, weights, path):
    for name, parameter in built.named_parameters():
        parameter.data.copy_(weights[name])


def _new_data(built, weights, path):
    for name, parameter in built.named_parameters():
        parameter.data = weights[name].clone()


def _swap(built, weights, path):
    for name, parameter in list(built.named_parameters()):
        owner, _, last = name.rpartition(".")
        fresh = nn.Parameter(weights[name].clone(), parameter.requires_grad)
        setattr(built.get_submodule(owner), last, fresh)


def _vector(built, weights, path):
    ordered = [weights[name] for name, _ in built.named_parameters()]
    vector = torch.cat([t.flatten() for t in ordered])
    torch.nn.utils.vector_to_parameters(vector, built.parameters())


LOADERS = {
    "load_state_dict": _load,
    "assign": _assign,
    "load_model": _load_model,
    "copy_": _copy_into_parameters,
    "data.copy_": _through_data,
    "data": _new_data,
    "setattr": _swap,
    "vector_to_parameters": _vector,
}


@pytest.mark.parametrize("way", LOADERS)
@pytest.mark.parametrize("kind, state", PAIRS)
def test_new_weights_are_the_ones_that_compute(kind, state, way, tmp_path):
    other, built = eager(kind), put(eager(kind), state)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + torch.rand_like(parameter))
    weights = copy.deepcopy(other.state_dict())
    LOADERS[way](built, weights, tmp_path)
    with torch.no_grad():
        close(run(built), run(other.train(built.training)))
    assert_same_weights(built, other, rtol=0)


@pytest.mark.parametrize("kind, state", PAIRS)
def test_casts_and_moves_carry_every_weight(kind, state):
    built, other = put(eager(kind), state), eager(kind)
    with torch.no_grad():
        for dtype in (torch.float64, torch.bfloat16, torch.float32):
            found, expected = run(built.to(dtype)), run(other.to(dtype))
            if dtype == torch.bfloat16:  # in which eager itself may be 0.13 from the truth
                truth = run(copy.deepcopy(other).double())
                assert (found - truth).norm() <= 1.25 * (expected - truth).norm()
            else:
                close(found, expected)
            assert {p.dtype for p in built.parameters()} == {dtype}
            assert_same_weights(built, other, rtol=0)
    assert all(p.is_meta for p in built.to("meta").parameters())


@pytest.mark.parametrize("kind, state", PAIRS)
def test_half_loaded_models_say_what_is_missing(kind, state):
    built = put(eager(kind), state)
    weights = built.state_dict()
    gone = [name for name in weights if name.endswith("weight")][3]
    del weights[gone]
    answer = built.load_state_dict(weights, strict=False)
    assert answer.missing_keys == [gone] and not answer.unexpected_keys
    with pytest.raises(RuntimeError, match=gone):
        built.load_state_dict(weights)
