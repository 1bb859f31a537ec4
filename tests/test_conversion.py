"""Converting checkpoints: names, dtypes, parts, LoRA, and nothing overwritten."""

import json
import shutil

import pytest
import torch
from published_layout import write_config, write_published
from safetensors.torch import load_file

from internvl_engine.checkpoint import CheckpointError
from internvl_engine.conversion import convert
from internvl_engine.modeling import InternVisionModel, InternVL_C, InternVL_G
from internvl_engine.modeling.vision import interpolate_positions

from golden_vectors import assert_golden, load_golden

FP32 = {"dtype": torch.float32}
TABLE = "vision_model.embeddings.position_embedding"


@pytest.fixture(scope="module")
def golden():
    return load_golden("encode_image_G")


@pytest.fixture
def folder(tmp_path, golden):
    return write_published(tmp_path / "published", golden)


def stored(folder) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def assert_equal(ours, theirs):
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_converting_keeps_everything(tmp_path, folder, golden):
    (folder / "tokenizer.model").write_bytes(b"pieces")
    written = convert(folder, tmp_path / "out")
    assert {path.name for path in written} == {"model.safetensors", "config.json"}
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"pieces"
    assert_equal(stored(tmp_path / "out"), golden.state)
    model = InternVL_G.from_pretrained(tmp_path / "out", **FP32)
    assert_equal(model.state_dict(), golden.state)


def test_converting_into_shards_of_another_dtype(tmp_path, folder, golden):
    written = convert(folder, tmp_path / "out", dtype="bfloat16", max_shard_size="200KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(written) == len(set(index["weight_map"].values())) + 2 > 4
    expected = {name: tensor.bfloat16() for name, tensor in golden.state.items()}
    assert_equal(stored(tmp_path / "out"), expected)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert all(path.stat().st_size < 220_000 for path in (tmp_path / "out").glob("*.safetensors"))
    assert InternVL_G.from_pretrained(tmp_path / "out", dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.golden
def test_the_standalone_file_becomes_a_published_one(tmp_path):
    golden = load_golden("c_pytorch")
    write_config(tmp_path, golden.config)
    torch.save(golden.state, tmp_path / "internvl_c_13b_224px.pth")
    convert(tmp_path, tmp_path / "out")
    model = InternVL_C.from_pretrained(tmp_path / "out", **FP32)
    assert model.config.parts == "c"
    assert "vision_model.encoder.layers.0.ls1" in stored(tmp_path / "out")
    with torch.no_grad():
        embeds = model.encode_image(golden.inputs["image"])
    assert_golden(embeds, golden.outputs["image_embeds"])


@pytest.mark.golden
def test_converting_merges_lora(tmp_path):
    golden = load_golden("lora_merged")
    start = "lora_state."
    state = {n.removeprefix(start): t for n, t in golden.inputs.items() if n.startswith(start)}
    convert(write_published(tmp_path / "lora", golden, state), tmp_path / "out", merge_lora=True)
    for name, tensor in stored(tmp_path / "out").items():
        assert_golden(tensor, golden.state[name])
    model = InternVL_G.from_pretrained(tmp_path / "out", **FP32)
    with torch.no_grad():
        embeds = model.encode_image(golden.inputs["image"])
    assert_golden(embeds, golden.outputs["image_embeds"])


def test_converting_parts_towers_and_sizes(tmp_path, folder, golden):
    convert(folder, tmp_path / "text", parts="text")
    assert InternVL_C.from_pretrained(tmp_path / "text").config.parts == "text"
    convert(folder, tmp_path / "tower", model_class=InternVisionModel)
    tower = InternVisionModel.from_pretrained(tmp_path / "tower", **FP32)
    assert torch.equal(tower.embeddings.position_embedding, golden.state[TABLE])
    convert(folder, tmp_path / "large", force_image_size=42)
    model = InternVL_G.from_pretrained(tmp_path / "large", **FP32)
    assert model.config.image_size == 42
    assert torch.equal(model.state_dict()[TABLE], interpolate_positions(golden.state[TABLE], 6, 6))


def test_converting_never_overwrites(folder):
    before = stored(folder)
    with pytest.raises(FileExistsError, match="holds weights already"):
        convert(folder, folder)
    assert_equal(stored(folder), before)


def test_converting_needs_room(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(CheckpointError, match=r"out: needed [\d,]+ bytes of room, there are 0"):
        convert(folder, tmp_path / "out")
