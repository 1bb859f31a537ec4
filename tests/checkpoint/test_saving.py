"""Saving twice, over itself, in other shards, with LoRA: what is read is what was saved last."""

import json

import pytest
import torch

from internvl_engine.modeling import InternVL_G

FP32 = {"dtype": torch.float32}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(published):
    return InternVL_G.from_pretrained(published, **FP32)


def assert_reads_back(folder, model):
    again = InternVL_G.from_pretrained(folder, **FP32)
    expected = model.state_dict()
    assert set(again.state_dict()) == set(expected)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("sizes", [("500KB", "1GB"), ("1GB", "500KB"), ("300KB", "600KB")])
def test_saving_again_in_other_shards(tmp_path, model, sizes):
    model.save_pretrained(tmp_path, max_shard_size=sizes[0])
    with torch.no_grad():
        model.logit_scale.add_(1)
    model.save_pretrained(tmp_path, max_shard_size=sizes[1])
    assert_reads_back(tmp_path, model)
    single = (tmp_path / "model.safetensors").is_file()
    assert single != (tmp_path / INDEX).is_file(), "both say that they are the model"
    if not single:
        named = set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())
        assert named == {path.name for path in tmp_path.glob("*.safetensors")}


def test_an_index_whose_shards_are_gone_counts_for_nothing(tmp_path, model):
    """As transformers itself leaves it behind."""
    model.save_pretrained(tmp_path / "a", max_shard_size="500KB")
    model.save_pretrained(tmp_path / "b")
    (tmp_path / "a" / INDEX).rename(tmp_path / "b" / INDEX)
    assert_reads_back(tmp_path / "b", model)


def test_a_rank_that_saves_nothing_removes_nothing(tmp_path, model):
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, is_main_process=False)
    assert_reads_back(tmp_path, model)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_lora_twice_is_refused_and_changes_nothing(tmp_path, model, golden_g):
    pytest.importorskip("peft")
    model.wrap_backbone_lora(4, lora_alpha=8)
    model.wrap_qllama_lora(8, lora_alpha=16)
    for wrap in (model.wrap_backbone_lora, model.wrap_qllama_lora):
        with pytest.raises(ValueError, match=r"has LoRA already: merge it first"):
            wrap(2, lora_alpha=64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path)
    image = golden_g.inputs["image"]
    with torch.no_grad():
        expected = model.eval().encode_image(image)
        for merge in (False, True):
            again = InternVL_G.from_pretrained(tmp_path, merge_lora=merge, **FP32)
            torch.testing.assert_close(again.encode_image(image), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_merged_lora_saves_without_it_and_can_be_wrapped_again(tmp_path, model):
    pytest.importorskip("peft")
    model.wrap_qllama_lora(8)
    model.qllama = model.qllama.merge_and_unload()
    model.save_pretrained(tmp_path)
    again = InternVL_G.from_pretrained(tmp_path, **FP32)
    assert again.config.use_qllama_lora == 0
    again.wrap_qllama_lora(4)
    again.save_pretrained(tmp_path)
    assert InternVL_G.from_pretrained(tmp_path, **FP32).config.use_qllama_lora == 4
