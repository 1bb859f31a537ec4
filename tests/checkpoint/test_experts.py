"""Mixtures of experts, whose files have an expert a tensor whatever models have."""

import json

import pytest
import torch
from chat_folders import assert_alike, state_of
from safetensors.torch import load_file, save_file
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    InternVLForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from internvl_engine.checkpoint import CheckpointError, load_language_model
from internvl_engine.modeling.chat import VisionLanguageModel

FP32 = {"dtype": torch.float32}
IDS = torch.tensor([[1, 5, 9, 2]])
EXPERT = "model.layers.1.mlp.experts.2"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A Qwen3-MoE as transformers saves it."""
    config = Qwen3MoeConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=24, intermediate_size=64, initializer_range=0.3,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("experts")
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_a_language_model_of_experts(saved):
    ours = load_language_model(saved, **FP32)
    theirs = Qwen3MoeForCausalLM.from_pretrained(saved, torch_dtype=torch.float32)
    assert f"{EXPERT}.gate_proj.weight" in load_file(saved / "model.safetensors")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    assert_alike(ours(IDS).logits, theirs(IDS).logits)


@pytest.fixture
def chat(tmp_path, saved):
    """A published chat checkpoint with that language model."""
    state = {n: t for n, t in state_of("qwen2_300m_v2").items() if not n.startswith("language")}
    experts = load_file(saved / "model.safetensors")
    state |= {f"language_model.{name}": tensor for name, tensor in experts.items()}
    language = json.loads((saved / "config.json").read_text())
    config = {
        "model_type": "internvl_chat", "llm_config": language, "template": "internvl2_5",
        "img_context_token_id": 90, "ps_version": "v2",
        "vision_config": {
            "hidden_size": 32, "image_size": 28, "patch_size": 7, "intermediate_size": 64,
            "num_attention_heads": 2, "num_hidden_layers": 4, "norm_type": "layer_norm",
            "qk_normalization": False, "qkv_bias": True,
        },
    }  # fmt: skip
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat" / "config.json").write_text(json.dumps(config))
    save_file(
        {n: t.contiguous() for n, t in state.items()}, tmp_path / "chat" / "model.safetensors"
    )
    return tmp_path / "chat", state


@torch.no_grad()
def test_a_chat_in_both_layouts(tmp_path, chat):
    folder, state = chat
    model = VisionLanguageModel.from_pretrained(folder, **FP32)
    model.save_pretrained(tmp_path / "b")
    stored = load_file(tmp_path / "b" / "model.safetensors")
    assert set(stored) == set(state)
    assert all(torch.equal(stored[name], tensor) for name, tensor in state.items())
    model.save_pretrained(tmp_path / "c", layout="transformers")
    theirs, info = InternVLForConditionalGeneration.from_pretrained(
        tmp_path / "c", torch_dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    assert_alike(model(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    again = VisionLanguageModel.from_pretrained(tmp_path / "c", **FP32)
    assert_alike(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_an_expert_that_is_missing(tmp_path, saved):
    state = load_file(saved / "model.safetensors")
    del state[f"{EXPERT}.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts"):
        load_language_model(tmp_path)


@torch.no_grad()
def test_experts_that_files_have_together(tmp_path):
    """GptOss: E, C, 2 * I, and so in its files."""
    config = GptOssConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, intermediate_size=24,
    )  # fmt: skip
    model = GptOssForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path)
    ours = load_language_model(tmp_path, **FP32)
    assert_alike(ours(IDS).logits, model(IDS).logits)
