"""Files that are something else than they should be, and callers with defaults of their own."""

import shutil

import pytest
import torch
from published_layout import write_bin, write_published
from safetensors.torch import save_file

from internvl_engine.checkpoint import CheckpointError
from internvl_engine.modeling import InternVL_G

from golden_vectors import load_golden

FP32 = {"dtype": torch.float32}


@pytest.fixture
def folder(tmp_path, published):
    return shutil.copytree(published, tmp_path / "checkpoint")


class Namespace:
    """Stands for what trainers put beside the weights."""


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_other_objects_in_a_pickle_are_named(tmp_path, golden_g, zipped):
    write_bin(tmp_path, golden_g)
    path = tmp_path / "pytorch_model.bin"
    held = {"model": golden_g.state, "args": Namespace()}
    torch.save(held, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=r"a pickle that holds other objects than tensors \(.*Namespace"
    ):
        InternVL_G.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {"state": {}}},
        lambda state: {"state_dict": state, "epoch": 3, "hyper_parameters": {"lr": 1e-6}},
        lambda state: {"net": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        lambda state: {"checkpoint": {"model": state}} | {},
        lambda state: {"model": {"state_dict": state}, "ema": state},
    ],
    ids=["scripts", "Lightning", "one of its own", "nested", "with averages"],
)
def test_what_trainers_wrap_a_state_dict_in(tmp_path, golden_g, wrap):
    write_bin(tmp_path, golden_g)
    torch.save(wrap(golden_g.state), tmp_path / "pytorch_model.bin")
    model = InternVL_G.from_pretrained(tmp_path, **FP32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, golden_g.state[name]), name


@pytest.mark.parametrize(
    "held, message",
    [
        ({"student": {"a": 1}, "teacher": {"a": 2}}, r"holds none, only student, teacher"),
        ([1, 2], "needed a dict of tensors, got list"),
        ({}, "holds none$"),
    ],
)
def test_pickles_without_a_state_dict(tmp_path, golden_g, held, message):
    write_bin(tmp_path, golden_g)
    torch.save(held, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        InternVL_G.from_pretrained(tmp_path)


def test_a_pickle_with_two_state_dicts(tmp_path, golden_g):
    write_bin(tmp_path, golden_g)
    torch.save(
        {"student": golden_g.state, "teacher": golden_g.state}, tmp_path / "pytorch_model.bin"
    )
    with pytest.raises(CheckpointError, match="which of these is the model\\? student, teacher"):
        InternVL_G.from_pretrained(tmp_path)


POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22e4d7a214614ab2935c943f9e0ff69d22e\n"
    "size 9932107232\n"
)


@pytest.mark.parametrize(
    "name", ["model-00002-of-00003.safetensors", "config.json", "model.safetensors.index.json"]
)
def test_git_lfs_pointers_are_called_so(folder, name):
    (folder / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=f"{name}: a Git-LFS pointer, .*`git lfs pull`"):
        InternVL_G.from_pretrained(folder)


def test_a_git_lfs_pointer_in_place_of_a_pickle(tmp_path, golden_g):
    write_bin(tmp_path, golden_g)
    (tmp_path / "pytorch_model.bin").write_text(POINTER)
    with pytest.raises(CheckpointError, match="pytorch_model.bin: a Git-LFS pointer"):
        InternVL_G.from_pretrained(tmp_path)


def test_a_file_with_the_ending_of_the_other_format(tmp_path, golden_g):
    write_bin(tmp_path, golden_g)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="one of PyTorch's own files; rename it to end in .b"):
        InternVL_G.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    save_file(golden_g.state, tmp_path / "weights.bin")
    model = InternVL_G.from_pretrained(tmp_path, **FP32)
    assert torch.equal(model.query_tokens, golden_g.state["query_tokens"])


def test_a_configuration_with_a_byte_order_mark(folder, golden_g):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text, encoding="utf-8-sig")
    model = InternVL_G.from_pretrained(folder, **FP32)
    assert torch.equal(model.query_tokens, golden_g.state["query_tokens"])


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_the_caller_changes_nothing(folder, golden_g, default):
    expected = InternVL_G.from_pretrained(folder, force_image_size=42, **FP32).state_dict()
    torch.set_default_dtype(default)
    try:
        actual = InternVL_G.from_pretrained(folder, force_image_size=42, **FP32).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in actual.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    "setting",
    [
        torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
    ],
    ids=["inference_mode", "no_grad", "autocast", "meta"],
)  # fmt: skip
def test_what_the_caller_has_switched_on_changes_nothing(tmp_path, golden_g, setting):
    golden = load_golden("lora_encode_G")
    write_published(tmp_path, golden)
    load = {"merge_lora": True, "force_image_size": 42, **FP32}
    expected = InternVL_G.from_pretrained(tmp_path, **load).state_dict()
    with setting():
        model = InternVL_G.from_pretrained(tmp_path, **load)
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cpu" and torch.equal(tensor, expected[name]), name
    model.encode_image(torch.randn(1, 3, 42, 42)).sum().backward()  # no inference tensors
    assert model.clip_projector.norm1_q.weight.grad is not None
