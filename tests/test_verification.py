"""Converting checkpoints and verifying downloaded ones."""

import hashlib
import json
import shutil

import pytest
import torch
from published_layout import write_config, write_published, write_sparse_shards
from safetensors.torch import load_file, save_file

from internvl_engine.checkpoint import CheckpointError
from internvl_engine.configuration import InternVLConfig
from internvl_engine.conversion import convert
from internvl_engine.modeling import InternVisionModel, InternVL_C, InternVL_G
from internvl_engine.modeling.vision import interpolate_positions
from internvl_engine.verification import check_example, verify
from internvl_engine.verification.example import PROBABILITIES, TEXTS, agree

from golden_vectors import GOLDEN, assert_golden, load_golden

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


def failed(report) -> dict[str, str]:
    return {f.check: f.detail for f in report.findings if f.passed is False}


def test_a_sound_checkpoint(folder, golden):
    report = verify(folder)
    assert report.ok and not failed(report)
    assert report.tensors == len(golden.state)
    assert report.parameters == sum(tensor.numel() for tensor in golden.state.values())
    shards = sorted(folder.glob("*.safetensors"))
    assert report.sha256 == {
        shard.name: hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards
    }
    assert {"file", "total size", "finite", "not empty"} <= {f.check for f in report.findings}
    assert str(report).endswith("is complete and sound")
    assert json.loads(json.dumps(report.as_dict()))["ok"]


def edit(folder, name, change):
    """Changes one tensor in its shard."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][name]
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(tensors[name])
    save_file(tensors, path)
    return path.name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(folder, value):
    name = "qllama.model.layers.1.mlp.up_proj.weight"
    shard = edit(folder, name, lambda tensor: tensor[3, 5:7].fill_(value))
    report = verify(folder)
    assert not report.ok
    assert list(failed(report)) == ["finite"]
    assert f"{name} in" in failed(report)["finite"] and shard in failed(report)["finite"]
    assert "(2 values)" in failed(report)["finite"]
    assert "FAIL finite" in str(report) and "NOT sound" in str(report)


def test_a_download_that_left_a_hole(folder):
    name = "vision_model.encoder.layers.2.attn.qkv.weight"
    edit(folder, name, lambda tensor: tensor.zero_())
    edit(folder, "vision_model.encoder.layers.2.attn.proj.bias", lambda tensor: tensor.zero_())
    report = verify(folder)
    assert list(failed(report)) == ["not empty"]
    assert name in failed(report)["not empty"] and "bias" not in failed(report)["not empty"]


def test_damage_is_reported_and_not_raised(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    report = verify(folder)
    assert not report.ok
    assert shard.name in failed(report)["names and shapes"]


def test_nothing_to_verify(tmp_path):
    report = verify(tmp_path)
    assert "no weights here" in failed(report)["names and shapes"]


def test_known_hashes(folder):
    shards = sorted(folder.glob("*.safetensors"))
    sums = {shard.name: hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards}
    (folder / "SHA256SUMS").write_text("".join(f"{v}  {k}\n" for k, v in sums.items()))
    assert verify(folder).ok
    # One bit of one value, which nothing else can tell.
    edit(folder, "itm_head.bias", lambda tensor: tensor[0].add_(1e-3))
    report = verify(folder)
    assert list(failed(report)) == ["sha256"]
    assert verify(folder, hashes=report.sha256).ok


def test_an_index_of_another_size(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["metadata"]["total_size"] += 2
    path.write_text(json.dumps(index))
    assert list(failed(verify(folder))) == ["total size"]


def test_archives_have_checksums(tmp_path, golden):
    write_config(tmp_path, golden.config)
    path = tmp_path / "pytorch_model.bin"
    torch.save(golden.state, path)
    assert verify(tmp_path).ok
    content = bytearray(path.read_bytes())
    start = content.find(golden.state["query_tokens"].numpy().tobytes()[:64])
    content[start + 3] ^= 1  # a bit of a weight, which leaves it finite
    path.write_bytes(content)
    assert list(failed(verify(tmp_path))) == ["archive"]


class Inputs:
    """Stands for the processor, whose own tests are elsewhere: fixed pixels, ids by text."""

    def __init__(self, pixels):
        self.pixels = pixels

    def __call__(self, images, text, dtype):
        ids = torch.tensor([[1, 5 + len(t) % 7, 9 + index, 2] for index, t in enumerate(text)])
        return {"pixel_values": self.pixels[: len(images)].to(dtype), "input_ids": ids}


def test_the_example_runs_both_modes(folder, golden):
    model = InternVL_G.from_pretrained(folder, **FP32)
    pixels = golden.inputs["image"].repeat(2, 1, 1, 1)[:3]
    results = check_example(model, Inputs(pixels), ["a.jpg", "b.jpg", "c.jpg"])
    ids = Inputs(pixels)([], TEXTS, torch.float32)["input_ids"]
    for mode, result in results.items():
        with torch.no_grad():
            expected = model(pixels, ids, mode=mode)[0].softmax(-1)
        torch.testing.assert_close(torch.tensor(result["probabilities"]), expected)
        assert result["published"] == PROBABILITIES[mode]
        assert result["agrees"] is False  # a tiny model knows no pandas
    others = check_example(model, Inputs(pixels), ["a.jpg"], ["one", "two"])
    assert others["InternVL-C"]["agrees"] is None


@pytest.mark.parametrize("mode", PROBABILITIES)
def test_agreement_allows_what_bfloat16_loses(mode):
    published = torch.tensor(PROBABILITIES[mode], dtype=torch.float64)
    logits = published.log()
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):  # 1/8, half the spacing of bfloat16 between 32 and 64
        noise = (torch.rand(3, 3, generator=generator, dtype=torch.float64) - 0.5) / 4
        rounded = (logits + noise).softmax(-1)
        assert agree(rounded.tolist(), PROBABILITIES[mode])
    swapped = [PROBABILITIES[mode][1], PROBABILITIES[mode][0], PROBABILITIES[mode][2]]
    assert not agree(swapped, PROBABILITIES[mode])
    other = PROBABILITIES["InternVL-G" if mode == "InternVL-C" else "InternVL-C"]
    assert not agree(other, PROBABILITIES[mode])


def test_verify_runs_the_example(folder, golden, monkeypatch):
    pixels = golden.inputs["image"].repeat(2, 1, 1, 1)[:3]
    monkeypatch.setattr(
        "internvl_engine.verification.checks.InternVLProcessor.from_pretrained",
        lambda _: Inputs(pixels),
    )
    report = verify(folder, ["1.jpg", "2.jpg", "3.jpg"])
    assert set(failed(report)) == {"example InternVL-C", "example InternVL-G"}
    assert len(report.example["InternVL-C"]["probabilities"]) == 3


def test_the_published_numbers_are_recognised(tmp_path):
    write_sparse_shards(tmp_path, json.loads((GOLDEN / "checkpoint_14b.json").read_text()))
    InternVLConfig().save_pretrained(tmp_path)
    report = verify(tmp_path, values=False, hashes=False)
    assert report.ok
    assert report.findings[0].detail == "1,048 tensors, 13,834,975,747 parameters as published"
