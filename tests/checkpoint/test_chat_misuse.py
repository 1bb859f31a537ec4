"""The wrong checkpoint, or the right one broken: what it is, and which class takes it."""

import json
import re

import pytest
import torch
from chat_folders import folder_of
from published_layout import write_published
from safetensors.torch import save_file

from internvl_engine import InternVL
from internvl_engine.checkpoint import CheckpointError, load_language_model
from internvl_engine.configuration import InternVLConfig, VisionLanguageConfig
from internvl_engine.modeling import InternVisionModel, InternVL_C, InternVLModel
from internvl_engine.modeling.chat import VisionLanguageModel

from golden_vectors import load_golden

CASE = "qwen2_300m_v2"
FP32 = {"dtype": torch.float32}


def refused(call, folder, *parts):
    """The call raises, and the message has the parts in their order."""
    with pytest.raises(ValueError, match="(?s)" + ".*".join(map(re.escape, parts))) as error:
        call(folder)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("case", [CASE, "hf_qwen2_6b"])
def test_a_chat_checkpoint_given_to_internvl_14b(tmp_path, case):
    folder = folder_of(tmp_path, case)
    for call in (
        InternVL.from_pretrained,
        InternVLModel.from_pretrained,
        InternVL_C.from_pretrained,
    ):
        refused(call, folder, "this is a chat checkpoint", "not an InternVL-14B checkpoint",
                "VisionLanguageModel and InternVLChat take it")  # fmt: skip
    refused(
        InternVLConfig.from_pretrained, folder, "a chat model's", "VisionLanguageConfig takes it"
    )


def test_an_internvl_14b_given_to_chat(tmp_path):
    folder = write_published(tmp_path, load_golden("encode_image_G"))
    refused(VisionLanguageModel.from_pretrained, folder, "this is an InternVL-14B checkpoint",
            "not a chat checkpoint", "InternVLModel, InternVL_C, InternVL_G and")  # fmt: skip
    refused(VisionLanguageConfig.from_pretrained, folder, "InternVL-14B", "InternVLConfig takes")
    refused(load_language_model, folder, "this is an InternVL-14B checkpoint", "stands alone")


def test_towers_given_to_chat(tmp_path):
    source = folder_of(tmp_path / "chat", CASE)
    InternVisionModel.from_pretrained(source, **FP32).save_pretrained(tmp_path / "vision")
    load_language_model(source, **FP32).save_pretrained(tmp_path / "language")
    take = VisionLanguageModel.from_pretrained
    refused(take, tmp_path / "vision", "an InternViT vision tower alone", "not a chat checkpoint",
            "InternVisionModel takes it", "from_parts(vision=..., language=...)")  # fmt: skip
    refused(take, tmp_path / "language", "a language model alone (Qwen2ForCausalLM)",
            "not a chat checkpoint", "from_parts(vision=..., language=...)")  # fmt: skip
    refused(load_language_model, tmp_path / "vision", "an InternViT vision tower alone")
    refused(InternVLModel.from_pretrained, tmp_path / "language", "a language model alone")


def test_a_peft_adapter_alone(tmp_path):
    about = {"base_model_name_or_path": "OpenGVLab/InternVL3-1B", "peft_type": "LORA", "r": 16}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    refused(
        VisionLanguageModel.from_pretrained,
        tmp_path,
        "a peft adapter (LORA, rank 16)",
        "Load OpenGVLab/InternVL3-1B with from_pretrained, then model.language_model = peft.",
    )
    refused(load_language_model, tmp_path, "a peft adapter", "model = peft.")


def test_a_missing_projector(tmp_path):
    folder = folder_of(
        tmp_path, CASE, lambda s: {n: t for n, t in s.items() if not n.startswith("mlp1.")}
    )
    refused(VisionLanguageModel.from_pretrained, folder, "6 weights are missing: mlp1.0.bias",
            "it has no projector (mlp1)", "from_parts(vision=..., language=...)")  # fmt: skip
    load_language_model(folder)


@pytest.mark.parametrize(
    "part, name, needed",
    [
        ("llm_config", "embed_tokens.weight", "needed shape (130, 64), got (130, 48)"),
        ("vision_config", "class_embedding", "needed shape (1, 1, 64), got (1, 1, 32)"),
    ],
)
def test_widths_that_do_not_fit(tmp_path, part, name, needed):
    folder = folder_of(tmp_path, CASE, **{part: {"hidden_size": 64}})
    refused(VisionLanguageModel.from_pretrained, tmp_path, needed)
    with pytest.raises(CheckpointError, match=name):
        VisionLanguageModel.from_pretrained(folder)


def test_a_projector_of_another_language_model(tmp_path):
    other = {"mlp1.1.weight": torch.ones(40, 128), "mlp1.1.bias": torch.ones(40),
             "mlp1.3.weight": torch.ones(40, 40), "mlp1.3.bias": torch.ones(40)}  # fmt: skip
    folder = folder_of(tmp_path, CASE, lambda state: state | other)
    refused(VisionLanguageModel.from_pretrained, folder)
    with pytest.raises(CheckpointError, match=r"mlp1\.1\.weight in .*: needed shape \(48, 128\)"):
        VisionLanguageModel.from_pretrained(folder)


@pytest.mark.parametrize("take", [VisionLanguageModel.from_pretrained, load_language_model])
def test_an_unknown_language_model(tmp_path, take):
    about = {"architectures": ["FooForCausalLM"], "model_type": "foo"}
    folder = folder_of(tmp_path, CASE, llm_config=about)
    with pytest.raises(ValueError, match="language model FooForCausalLM .* is unknown"):
        take(folder)


def test_pointers_of_git_lfs(tmp_path):
    folder = folder_of(tmp_path, CASE)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 773373\n"
    (folder / "model.safetensors").write_text(pointer)
    refused(VisionLanguageModel.from_pretrained, folder, "a Git-LFS pointer", "git lfs pull")


@pytest.mark.parametrize("stated", [True, False])
def test_quantized_checkpoints(tmp_path, stated):
    linear = "language_model.model.layers.0.mlp.up_proj"

    def quantized(state):
        del state[f"{linear}.weight"]
        return state | {f"{linear}.{e}": torch.ones(4, dtype=torch.int32)
                        for e in ("qweight", "qzeros", "scales")}  # fmt: skip

    about = {"quantization_config": {"quant_method": "awq", "bits": 4}} if stated else {}
    folder = folder_of(tmp_path, CASE, quantized, llm_config=about)
    kind = "AWQ, 4 bits" if stated else "AWQ or GPTQ"
    refused(VisionLanguageModel.from_pretrained, folder, f"quantized with {kind}", "not supported")
    InternVisionModel.from_pretrained(folder)


def test_a_folder_that_has_nothing(tmp_path):
    for take in (VisionLanguageModel.from_pretrained, load_language_model):
        with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
            take(tmp_path)


@pytest.mark.parametrize(
    "keyword, reason",
    [
        ({"load_in_8bit": True}, "load_in_8bit=True is not supported"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes, 4 bits"),
        ({"lora_alpha": 16}, "lora_alpha came, but the checkpoint has no LoRA"),
    ],
)
def test_what_would_not_happen_is_refused(tmp_path, keyword, reason):
    with pytest.raises(ValueError, match=reason):
        VisionLanguageModel.from_pretrained(folder_of(tmp_path, CASE), **keyword)


@pytest.mark.parametrize("field", ["vision_config", "llm_config"])
def test_a_configuration_without_a_part(tmp_path, field):
    folder = folder_of(tmp_path, CASE, **{field: None})
    refused(VisionLanguageModel.from_pretrained, folder, "needs vision_config and llm_config",
            f"{field} is None")  # fmt: skip


def test_an_unknown_kind_of_rotary_scaling(tmp_path):
    scaling = {"type": "foo", "factor": 2.0}
    folder = folder_of(tmp_path, "llama_6b_v1", llm_config={"rope_scaling": scaling})
    refused(VisionLanguageModel.from_pretrained, folder, "'foo'", "known are", "yarn")
