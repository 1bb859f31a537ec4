"""Damaged checkpoints: a right answer or an error that names file and key, never silence."""

import json
import shutil
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from published_layout import write_bin, write_published
from safetensors.torch import load_file, save_file

from internvl_engine.checkpoint import CheckpointError, CheckpointNotFoundError
from internvl_engine.modeling import InternVisionModel, InternVL_G

FP32 = {"dtype": torch.float32}
SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path, published):
    return shutil.copytree(published, tmp_path / "checkpoint")


def change(path, **tensors):
    """Replaces tensors of a safetensors file, and drops those that are None."""
    state = {**load_file(path), **tensors}
    save_file({n: t.clone() for n, t in state.items() if t is not None}, path)


def first(path) -> str:
    return sorted(load_file(path))[0]


@pytest.mark.parametrize("name", ["config.json", SHARD])
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointNotFoundError, match=name) as error:
        InternVL_G.from_pretrained(folder)
    assert isinstance(error.value, FileNotFoundError) and isinstance(error.value, ValueError)


def test_shards_without_an_index(folder):
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match=f"no {INDEX} says how these .* {SHARD}"):
        InternVL_G.from_pretrained(folder)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="no weights here; needed model.safetensors"):
        InternVL_G.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name, message",
    [
        ("zero_to_fp32.py", "but DeepSpeed's shards of an optimizer: run zero_to_fp32.py"),
        ("state/__0_0.distcp", "but shards of torch.distributed.checkpoint: .*dcp_to_torch"),
        ("model.gguf", "but GGUF files, which cannot be read"),
    ],
)
def test_what_is_there_in_place_of_weights(folder, name, message):
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).touch()
    with pytest.raises(CheckpointNotFoundError, match=f"no weights here, {message}"):
        InternVL_G.from_pretrained(folder)


@pytest.mark.parametrize("source", ["no/such/folder", "OpenGVLab/InternVL-14B-224px", "a b?"])
def test_what_is_neither_here_nor_on_the_hub(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="there is no such") as error:
        InternVL_G.from_pretrained(source, cache_dir=tmp_path)
    assert source in str(error.value)
    if source.startswith("Open"):
        assert f"hf download {source}" in str(error.value)


def test_a_missing_key_of_a_shard(folder):
    key = first(folder / SHARD)
    change(folder / SHARD, **{key: None})
    with pytest.raises(CheckpointError, match=f"{SHARD}: lacks {key}, which .*{INDEX} says"):
        InternVL_G.from_pretrained(folder)


@pytest.mark.parametrize("key", ["text_projection", "qllama.model.norm.weight", "query_tokens"])
def test_a_missing_weight(tmp_path, golden_g, key):  # K13: nothing is ever made up
    state = {name: tensor for name, tensor in golden_g.state.items() if name != key}
    with pytest.raises(CheckpointError, match=f"1 weights are missing: {key}"):
        InternVL_G.from_pretrained(write_published(tmp_path, golden_g, state))


def test_many_missing_weights_are_counted(tmp_path, golden_g):
    state = {n: t for n, t in golden_g.state.items() if not n.startswith("vision_model.encoder")}
    with pytest.raises(CheckpointError, match=r"\d\d weights are missing: .* and \d+ more$"):
        InternVL_G.from_pretrained(write_published(tmp_path, golden_g, state))


def test_weights_without_a_place(tmp_path, golden_g):
    extra = {
        "qllama.model.layers.9.self_attn.q_proj.weight": torch.ones(2),
        "mlp1.bias": torch.ones(2),
    }
    write_published(tmp_path, golden_g, golden_g.state | extra)
    with pytest.raises(CheckpointError, match="2 weights have no place in InternVL_G: mlp1.bias"):
        InternVL_G.from_pretrained(tmp_path)
    model = InternVL_G.from_pretrained(tmp_path, strict=False, **FP32)
    assert torch.equal(model.query_tokens, golden_g.state["query_tokens"])


def test_another_shape(folder):
    key = "clip_projector.cross_attn.proj.weight"
    shard = json.loads((folder / INDEX).read_text())["weight_map"][key]
    change(folder / shard, **{key: torch.ones(24, 47)})
    with pytest.raises(
        CheckpointError, match=rf"{key} in .*{shard}: needed shape \(24, 48\), got \(24, 47\)"
    ):
        InternVL_G.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_another_kind_of_dtype(folder, dtype):
    key = first(folder / SHARD)
    change(folder / SHARD, **{key: load_file(folder / SHARD)[key].to(dtype)})
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(
        CheckpointError, match=f"{key} in .*{SHARD}: needed one of float64, .*, got {name}"
    ):
        InternVL_G.from_pretrained(folder)


def test_quantized_floats_are_not_weights(folder):
    key = first(folder / SHARD)
    change(folder / SHARD, **{key: load_file(folder / SHARD)[key].to(torch.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match=f"{key} in .*got float8_e4m3fn"):
        InternVL_G.from_pretrained(folder)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_an_index_that_is_none(folder, content):
    (folder / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=INDEX):
        InternVL_G.from_pretrained(folder)


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "", None, 7])
def test_an_index_that_points_elsewhere(folder, file):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["query_tokens"] = file
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="query_tokens must lie in a file beside it"):
        InternVL_G.from_pretrained(folder)


@pytest.mark.parametrize("content", ["", "not json", "[]", '"text"', "{"])
def test_a_configuration_that_is_none(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        InternVL_G.from_pretrained(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "bert", "hidden_size": 8},
        {"model_type": "internvl_chat", "vision_config": {}, "llm_config": {}},
        {"vision_config": {"hidden_size": 7}, "qllama_config": {}},
        {"vision_config": 3, "qllama_config": {}},
        {"vision_config": {"norm_type": "batch_norm"}, "qllama_config": {}},
    ],
)
def test_a_configuration_of_something_else(folder, values):
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"config\.json: not a InternVLConfig"):
        InternVL_G.from_pretrained(folder)


def test_a_web_page_in_place_of_weights(folder):
    (folder / SHARD).write_text("<html>please log in</html>")
    with pytest.raises(CheckpointError, match=f"{SHARD}: not a complete safetensors file"):
        InternVL_G.from_pretrained(folder)


def test_code_in_a_pickle_is_not_run(tmp_path, golden_g):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("code of a checkpoint ran",))

    write_bin(tmp_path, golden_g)
    torch.save({"weights": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError,
        match=r"pytorch_model.bin: a pickle .* than tensors \(_pytest\.outcomes\._?[Ff]ail",
    ):
        InternVL_G.from_pretrained(tmp_path)


def assert_right_or_refused(source, state):
    try:
        model = InternVL_G.from_pretrained(source, **FP32)
    except CheckpointError as error:
        assert str(source) in str(error)
        return
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@settings(max_examples=15)
@given(data=st.data())
@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_files_cut_anywhere(tmp_path_factory, golden_g, layout, data):
    folder = tmp_path_factory.mktemp("cut")
    write = write_bin if layout == "bin" else write_published
    write(folder, golden_g, shards=1)
    path = next(path for path in folder.iterdir() if path.suffix != ".json")
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(data.draw(st.integers(0, size - 1)))
    with pytest.raises(CheckpointError, match=path.name):
        InternVL_G.from_pretrained(folder)


@settings(max_examples=60)
@given(data=st.data())
def test_headers_with_a_byte_changed(tmp_path_factory, golden_g, data):
    """Of the data alone nobody can tell: `verify` compares hashes."""
    folder = write_published(tmp_path_factory.mktemp("bytes"), golden_g, shards=1)
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    place = data.draw(st.integers(0, header - 1))
    content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    assert_right_or_refused(folder, golden_g.state)


@settings(max_examples=25)
@given(data=st.data())
def test_tensors_dropped_bent_or_recast(tmp_path_factory, golden_g, data):
    name = data.draw(st.sampled_from(sorted(golden_g.state)))
    state = dict(golden_g.state)
    damage = data.draw(st.sampled_from(["drop", "rename", "flatten", "grow", "integer", "double"]))
    tensor = state.pop(name)
    if damage == "rename":
        state[name + "s"] = tensor
    elif damage == "flatten":
        state[name] = tensor.reshape(1, -1)
    elif damage == "grow":
        state[name] = torch.cat((tensor.reshape(-1), torch.ones(1)))
    elif damage == "integer":
        state[name] = tensor.int()
    elif damage == "double":
        state[name] = tensor.double()
    folder = write_published(tmp_path_factory.mktemp("damaged"), golden_g, state, shards=2)
    if damage == "double":  # another precision of the same numbers
        assert_right_or_refused(folder, golden_g.state)
        return
    with pytest.raises(CheckpointError) as error:
        InternVL_G.from_pretrained(folder)
    assert name.removesuffix(".weight") in str(error.value) or "cross_attn" in name


def test_a_tower_names_its_missing_weights(folder, golden_g):
    state = {n: t for n, t in golden_g.state.items() if not n.endswith("layers.1.norm1.weight")}
    shutil.rmtree(folder)
    write_published(folder, golden_g, state)
    with pytest.raises(CheckpointError, match=r"missing: encoder\.layers\.1\.norm1\.weight"):
        InternVisionModel.from_pretrained(folder)
