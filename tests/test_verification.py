"""Verifying downloaded checkpoints: what is sound, and every kind of damage."""

import hashlib
import io
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from published_layout import write_config, write_published, write_sparse_shards
from safetensors.torch import load_file, save_file

from internvl_engine.assets import nano_directory
from internvl_engine.configuration import InternVLConfig
from internvl_engine.conversion import convert
from internvl_engine.modeling import InternVL_G
from internvl_engine.verification import check_example, verify
from internvl_engine.verification.example import PROBABILITIES, TEXTS, agree

from golden_vectors import GOLDEN, load_golden

FP32 = {"dtype": torch.float32}
TABLE = "vision_model.embeddings.position_embedding"


@pytest.fixture(scope="module")
def golden():
    return load_golden("encode_image_G")


@pytest.fixture
def folder(tmp_path, golden, pieces):
    folder = write_published(tmp_path / "published", golden)
    (folder / "tokenizer.model").write_bytes(pieces)
    return folder


@pytest.fixture(scope="module")
def pieces() -> bytes:
    """A SentencePiece model of 80 pieces; the golden model has room for 97."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["summarize: a photo of a red panda and two dogs on the beach"] * 9),
        model_writer=model, model_type="bpe", vocab_size=80, unk_id=0, bos_id=1, eos_id=2,
        pad_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


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


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 773373\n"


@pytest.mark.parametrize(
    "content, detail",
    [
        (None, "has no tokenizer.model"),
        (b"", "tokenizer.model is no SentencePiece model"),
        (b"no pieces", "tokenizer.model is no SentencePiece model"),
        (POINTER.encode(), "tokenizer.model.*Git-LFS pointer"),
    ],
    ids=["missing", "empty", "broken", "Git-LFS"],
)
def test_a_tokenizer_that_is_none(folder, content, detail):
    path = folder / "tokenizer.model"
    path.unlink() if content is None else path.write_bytes(content)
    report = verify(folder)
    assert not report.ok and list(failed(report)) == ["processor"]
    assert re.search(detail, failed(report)["processor"])


def test_a_tokenizer_of_another_model(folder):
    shutil.copy(nano_directory() / "tokenizer.model", folder)
    assert failed(verify(folder)) == {"tokenizer": "256 pieces, the model knows 97"}


def test_an_image_tower_needs_no_tokenizer(tmp_path, folder):
    InternVL_G.from_pretrained(folder, parts="image", **FP32).save_pretrained(tmp_path / "image")
    report = verify(tmp_path / "image")
    assert report.ok, str(report)


@pytest.mark.filterwarnings("ignore:.*the position table is for 42 px")
def test_image_settings_of_another_size(tmp_path, folder):
    InternVL_G.from_pretrained(folder, force_image_size=42, **FP32).save_pretrained(tmp_path / "a")
    shutil.copy(folder / "tokenizer.model", tmp_path / "a")
    assert verify(tmp_path / "a").ok
    shutil.copy(folder / "config.json", tmp_path / "a")
    report = verify(tmp_path / "a")
    assert list(failed(report)) == ["image size"]
    assert "settings say 28 px, the position table is for 42 px" in failed(report)["image size"]
    convert(tmp_path / "a", tmp_path / "b")
    assert verify(tmp_path / "b").ok


def test_an_index_of_another_size(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["metadata"]["total_size"] += 2
    path.write_text(json.dumps(index))
    assert list(failed(verify(folder))) == ["total size"]


def test_archives_have_checksums(tmp_path, golden, pieces):
    write_config(tmp_path, golden.config)
    (tmp_path / "tokenizer.model").write_bytes(pieces)
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

    tokenizer, image_processor = range(97), SimpleNamespace(size=28)

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


def test_the_published_numbers_are_recognised(tmp_path, pieces):
    (tmp_path / "tokenizer.model").write_bytes(pieces)
    write_sparse_shards(tmp_path, json.loads((GOLDEN / "checkpoint_14b.json").read_text()))
    InternVLConfig().save_pretrained(tmp_path)
    report = verify(tmp_path, values=False, hashes=False)
    assert report.ok
    assert report.findings[0].detail == "1,048 tensors, 13,834,975,747 parameters as published"
