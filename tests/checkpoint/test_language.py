"""The language model alone: out of chats in every layout, and out of folders of its own."""

import json

import pytest
import torch
from chat_folders import CASES, assert_alike, folder_of, recorded
from safetensors.torch import load_file, save_file

from internvl_engine.checkpoint import CheckpointError, load_language_model
from internvl_engine.modeling.chat import VisionLanguageModel

pytestmark = [pytest.mark.golden, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")]
FP32 = {"dtype": torch.float32}
CLASSES = {"internlm2": "LlamaForCausalLM", "llama": "LlamaForCausalLM", "phi3": "Phi3ForCausalLM",
           "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}  # fmt: skip


def bare(folder, case):
    """The language model of a published chat as its makers publish it, remote code and all."""
    chat = folder_of(folder / "chat", case)
    config = json.loads((chat / "config.json").read_text())["llm_config"]
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_remote.Remote"}
    start = "language_model."
    state = {
        name.removeprefix(start): tensor.clone()
        for name, tensor in load_file(chat / "model.safetensors").items()
        if name.startswith(start)
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_remote.py").write_text("raise SystemExit('remote code was run')")
    save_file(state, folder / "model.safetensors")
    return folder


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_out_of_a_chat(tmp_path, case):
    folder = folder_of(tmp_path, case, shards=2)
    model = load_language_model(folder, merge_lora=case == "internlm2_lora", **FP32)
    kind = CLASSES[case.removeprefix("hf_").partition("_")[0]]
    assert type(model).__name__ == kind and type(model).__module__.startswith("transformers.")
    whole = VisionLanguageModel.from_pretrained(
        folder, merge_lora=case == "internlm2_lora", **FP32
    ).language_model
    ids = recorded(case)[0]["in.input_ids"][:, :12]
    assert_alike(model(ids).logits, whole(ids).logits)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings == case.startswith(("qwen3", "hf_qwen3"))


@torch.no_grad()
@pytest.mark.parametrize(
    "case", ["internlm2_300m_dynamic", "phi3_300m_su_long", "qwen2_300m_v2", "qwen3_300m_tied"]
)
def test_a_folder_of_its_own(tmp_path, case):
    """Remote code is not run."""
    folder = bare(tmp_path, case)
    model = load_language_model(folder, **FP32)
    expected = load_language_model(tmp_path / "chat", **FP32)
    ids = torch.tensor([[1, 5, 9, 7, 2]])
    assert_alike(model(ids).logits, expected(ids).logits)
    assert set(model.state_dict()) == set(expected.state_dict())


def test_lora_must_be_merged(tmp_path):
    folder = folder_of(tmp_path, "internlm2_lora")
    with pytest.raises(CheckpointError, match="pass merge_lora=True"):
        load_language_model(folder)
    merged = VisionLanguageModel.from_pretrained(folder, merge_lora=True, **FP32).language_model
    alone = load_language_model(folder, merge_lora=True, **FP32)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, merged.state_dict()[name]), name


def test_an_alpha_that_was_saved(tmp_path):
    pytest.importorskip("peft")
    folder = folder_of(tmp_path / "a", "internlm2_lora", llm_lora_alpha=24)
    whole = VisionLanguageModel.from_pretrained(folder, merge_lora=True, **FP32).language_model
    alone = load_language_model(folder, merge_lora=True, **FP32)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name
    other = folder_of(tmp_path / "b", "internlm2_lora")
    name = "model.layers.0.self_attn.v_proj.weight"
    plain = load_language_model(other, merge_lora=True, **FP32).state_dict()[name]
    assert not torch.equal(plain, alone.state_dict()[name])


def test_options_of_loading(tmp_path):
    folder = folder_of(tmp_path / "a", "internlm2_300m_dynamic")
    model = load_language_model(
        folder, dtype="bfloat16", trust_remote_code=True, device_map={"": "disk"},
        offload_folder=tmp_path / "b",
    )  # fmt: skip
    exact = load_language_model(folder, dtype="bfloat16")
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        assert_alike(model(ids).logits, exact(ids).logits)
    with pytest.raises(TypeError, match="foo is neither an argument nor a field"):
        load_language_model(folder, foo=1)
