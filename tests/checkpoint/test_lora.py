"""LoRA in checkpoints: kept as it is, or merged into the weights it adapts."""

import pytest
import torch
from published_layout import write_published

from internvl_engine.checkpoint import CheckpointError
from internvl_engine.checkpoint.names import canonical
from internvl_engine.modeling import InternVisionModel, InternVL_G
from internvl_engine.modeling.qllama import LlamaForCausalLM

from golden_vectors import assert_golden, load_golden

pytest.importorskip("peft")
pytestmark = pytest.mark.golden
FP32 = {"dtype": torch.float32}


@pytest.fixture(scope="module")
def golden():
    return load_golden("lora_encode_G")


@pytest.fixture(scope="module")
def lora(tmp_path_factory, golden):
    return write_published(tmp_path_factory.mktemp("lora"), golden)


def old_names(state: dict) -> dict:
    """As peft before 0.6 named the adapted weights."""
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items()}


@torch.no_grad()
@pytest.mark.parametrize("rename", [dict, old_names])
def test_lora_is_kept(tmp_path, golden, rename):
    write_published(tmp_path / "a", golden, rename(golden.state))
    model = InternVL_G.from_pretrained(tmp_path / "a", **FP32)
    assert (model.config.use_backbone_lora, model.config.backbone_lora_alpha) == (4, 8)
    assert (model.config.use_qllama_lora, model.config.qllama_lora_alpha) == (8, 16)
    assert set(model.state_dict()) == set(golden.state)
    assert_golden(model.encode_image(golden.inputs["image"]), golden.outputs["image_embeds"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "_model.base_" in name} == {
        name for name in golden.state if name.startswith("vision_model") and ".lora_" in name
    }
    model.save_pretrained(tmp_path / "b")
    again = InternVL_G.from_pretrained(tmp_path / "b", **FP32)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, golden.state[name]), name


@torch.no_grad()
@pytest.mark.parametrize("rename", [dict, old_names])
def test_lora_is_merged(tmp_path, rename):
    golden = load_golden("lora_merged")
    start = "lora_state."
    state = {n.removeprefix(start): t for n, t in golden.inputs.items() if n.startswith(start)}
    write_published(tmp_path, golden, rename(state))
    model = InternVL_G.from_pretrained(tmp_path, merge_lora=True, **FP32)
    assert model.config.use_backbone_lora == model.config.use_qllama_lora == 0
    assert set(model.state_dict()) == set(golden.state)
    for name, tensor in model.state_dict().items():
        assert_golden(tensor, golden.state[name])
    assert_golden(model.encode_image(golden.inputs["image"]), golden.outputs["image_embeds"])


@torch.no_grad()
def test_alpha_of_the_llava_family(lora):
    golden = load_golden("lora_encode_G_llava_alpha256")
    for merge in (False, True):
        model = InternVL_G.from_pretrained(lora, lora_alpha=256, merge_lora=merge, **FP32)
        states = model.get_image_features(golden.inputs["pixel_values"])
        assert_golden(states[0], golden.outputs["last_hidden_state"])
        assert_golden(states[1], golden.outputs["query_features"])


@torch.no_grad()
def test_alpha_of_the_configuration_survives_saving(tmp_path, lora, golden):
    first = InternVL_G.from_pretrained(lora, lora_alpha=32, **FP32)
    first.save_pretrained(tmp_path)
    expected = first.encode_image(golden.inputs["image"])
    for merge in (False, True):
        again = InternVL_G.from_pretrained(tmp_path, merge_lora=merge, **FP32)
        assert_golden(again.encode_image(golden.inputs["image"]), expected)


def test_merging_rounds_once(lora, golden):
    merged = InternVL_G.from_pretrained(lora, merge_lora=True, dtype=torch.bfloat16)
    exact = InternVL_G.from_pretrained(lora, merge_lora=True, dtype=torch.float32)
    for name, tensor in exact.state_dict().items():
        assert torch.equal(merged.state_dict()[name], tensor.bfloat16()), name


def test_a_tower_alone_takes_merged_weights_only(lora, golden):
    merged = InternVL_G.from_pretrained(lora, merge_lora=True, **FP32).state_dict()
    for kind, prefix in ((InternVisionModel, "vision_model."), (LlamaForCausalLM, "qllama.")):
        with pytest.raises(CheckpointError, match="pass merge_lora=True"):
            kind.from_pretrained(lora)
        for name, tensor in (
            kind.from_pretrained(lora, merge_lora=True, **FP32).state_dict().items()
        ):
            assert torch.equal(tensor, merged[prefix + name]), name


def test_a_configuration_that_promises_lora(tmp_path, golden_g):
    golden_g.config["use_qllama_lora"] = 8
    try:
        write_published(tmp_path, golden_g)  # the weights are merged already
    finally:
        del golden_g.config["use_qllama_lora"]
    model = InternVL_G.from_pretrained(tmp_path, **FP32)
    assert model.config.use_qllama_lora == 0
    assert set(model.state_dict()) == set(golden_g.state)


def without(state: dict, part: str) -> dict:
    return {name: tensor for name, tensor in state.items() if part not in name}


def test_damaged_lora(tmp_path, golden):
    half = without(golden.state, "layers.0.attn.qkv.lora_B")
    with pytest.raises(CheckpointError, match=r"one of them is missing for .*0\.attn\.qkv"):
        InternVL_G.from_pretrained(write_published(tmp_path / "half", golden, half))
    less = without(golden.state, "mlp.up_proj.lora_")
    folder = write_published(tmp_path / "less", golden, less)
    with pytest.raises(CheckpointError, match=r"up_proj\.lora_A.*pass merge_lora=True"):
        InternVL_G.from_pretrained(folder)
    assert InternVL_G.from_pretrained(folder, merge_lora=True).config.use_qllama_lora == 0
    name = "vision_model.base_model.model.encoder.layers.0.attn.qkv.lora_A.default.weight"
    bent = golden.state | {name: torch.ones(4, 47)}
    for merge in (False, True):
        with pytest.raises(CheckpointError, match=r"lora_A.*needed shape \(4, 48\), got \(4, 47\)"):
            folder = write_published(tmp_path / f"bent{merge}", golden, bent)
            InternVL_G.from_pretrained(folder, merge_lora=merge)
    twice = golden.state | {
        canonical(n): t + 1 for n, t in golden.state.items() if n.endswith("fc1.base_layer.bias")
    }
    with pytest.raises(CheckpointError, match="are the same weight"):
        InternVL_G.from_pretrained(write_published(tmp_path / "twice", golden, twice))


def test_alpha_without_lora(published):
    with pytest.raises(ValueError, match="lora_alpha came, but the checkpoint has no LoRA"):
        InternVL_G.from_pretrained(published, lora_alpha=16)
