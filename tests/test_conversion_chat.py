"""Converting and verifying chat checkpoints: layouts, dtypes, parts, LoRA."""

import json

import pytest
import torch
from chat_folders import (
    CHATS,
    WEIGHTS,
    assert_alike,
    assert_same_bits,
    folder_of,
    recorded,
    state_of,
)
from safetensors.torch import load_file
from tiny_chat import tokenizer

from internvl_engine.conversion import convert
from internvl_engine.modeling import InternVisionModel
from internvl_engine.modeling.chat import VisionLanguageModel
from internvl_engine.verification import verify

pytestmark = [pytest.mark.golden, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")]
INTERNLM = "internlm2_300m_dynamic"
FP32 = {"dtype": torch.float32}


def with_placeholder(folder, case):
    folder_of(folder, case)
    token = {"<IMG_CONTEXT>": recorded(case)[1]["img_context_token_id"]}
    (folder / "added_tokens.json").write_text(json.dumps(token))
    return folder


@pytest.mark.parametrize("case", [INTERNLM, "qwen3_300m_tied", "qwen2_6b_bf16"])
def test_one_layout_into_the_other_and_back(tmp_path, case):
    source = with_placeholder(tmp_path / "a", case)
    written = convert(source, tmp_path / "b", layout="transformers")
    assert {path.name for path in written} == {WEIGHTS, "config.json", "added_tokens.json"}
    assert json.loads((tmp_path / "b" / "config.json").read_text())["model_type"] == "internvl"
    convert(tmp_path / "b", tmp_path / "c")  # as it is
    assert_same_bits(tmp_path / "c", load_file(tmp_path / "b" / WEIGHTS))
    convert(tmp_path / "b", tmp_path / "d", layout="published", max_shard_size="100KB")
    assert (tmp_path / "d" / f"{WEIGHTS}.index.json").is_file()
    assert_same_bits(tmp_path / "d", state_of(case))


@pytest.mark.parametrize("case", ["hf_qwen2_6b", "internlm2_lora", "llama_6b_v1"])
def test_as_it_is(tmp_path, case):
    convert(folder_of(tmp_path / "a", case), tmp_path / "b")
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == (CHATS / case / WEIGHTS).read_bytes()


def test_lora_is_merged(tmp_path):
    source = with_placeholder(tmp_path / "a", "internlm2_lora")
    with pytest.raises(ValueError, match="transformers' layout has no LoRA.*merge_lora=True"):
        convert(source, tmp_path / "b", layout="transformers")
    for layout in ("transformers", "published"):
        convert(source, tmp_path / layout, layout=layout, merge_lora=True)
    merged = load_file(tmp_path / "published" / WEIGHTS)
    expected = state_of("internlm2_lora_merged")
    assert set(merged) == set(expected)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], msg=name)
    convert(tmp_path / "transformers", tmp_path / "again", layout="published")
    assert_same_bits(tmp_path / "again", merged)


def test_parts_and_dtypes(tmp_path):
    source = folder_of(tmp_path / "a", "hf_qwen2_6b")
    convert(source, tmp_path / "b", parts="vision", dtype="bfloat16")
    model = VisionLanguageModel.from_pretrained(tmp_path / "b", dtype=torch.bfloat16)
    assert model.config.parts == "vision"
    whole = VisionLanguageModel.from_pretrained(source, dtype=torch.bfloat16)
    pixels = recorded("hf_qwen2_6b")[0]["in.pixel_values"]
    with torch.no_grad():
        assert_alike(model.extract_feature(pixels), whole.extract_feature(pixels))
    convert(source, tmp_path / "c", model_class=InternVisionModel)
    tower = InternVisionModel.from_pretrained(tmp_path / "c", **FP32)
    stored = VisionLanguageModel.from_pretrained(source, **FP32).vision_model.state_dict()
    for name, tensor in tower.state_dict().items():
        assert torch.equal(tensor, stored[name]), name


def test_another_size_of_images(tmp_path):
    source = folder_of(tmp_path / "a", "llama_6b_resize")
    convert(source, tmp_path / "b", force_image_size=56)
    model = VisionLanguageModel.from_pretrained(tmp_path / "b", **FP32)
    resized = VisionLanguageModel.from_pretrained(source, force_image_size=56, **FP32)
    assert model.config.image_size == model.config.vision_config.image_size == 56
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resized.state_dict()[name]), name


def test_layouts_are_those_of_chat_models(tmp_path):
    from internvl_engine.assets import nano_directory

    with pytest.raises(ValueError, match="layout='published': only chat models have several"):
        convert(nano_directory(), tmp_path, layout="published")


@pytest.fixture
def sound(tmp_path):
    """A chat checkpoint with a tokenizer whose ids are rows of its embedding."""
    words = tokenizer()
    rows = len(words)

    def wider(state):
        names = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
        return state | {name: torch.randn(rows, state[name].shape[1]) for name in names}

    folder = folder_of(tmp_path / "sound", "qwen2_300m_v2", wider, llm_config={"vocab_size": rows})
    words.save_pretrained(folder)
    return folder


def failed(report):
    return {finding.check: finding.detail for finding in report.findings if not finding.passed}


def test_a_sound_checkpoint(sound):
    report = verify(sound, hashes=False)
    assert report.ok and not failed(report), str(report)
    assert report.tensors == len(load_file(sound / WEIGHTS))
    assert {"tokenizer", "placeholder", "finite"} <= {finding.check for finding in report.findings}
    report = verify(sound, ["a.jpg"], hashes=False)
    assert "published with InternVL-14B" in str(report) and report.ok


def test_damage(sound, tmp_path):
    state = load_file(sound / WEIGHTS)
    state["mlp1.1.bias"][3] = float("nan")
    folder = folder_of(tmp_path / "b", "qwen2_300m_v2", lambda _: state,
                       llm_config={"vocab_size": len(tokenizer()) - 1})  # fmt: skip
    assert "lm_head" in failed(verify(folder))["names and shapes"]
    (folder / "config.json").write_bytes((sound / "config.json").read_bytes())
    found = failed(verify(folder, hashes=False))
    assert set(found) == {"tokenizer", "finite"} and "mlp1.1.bias" in found["finite"]
    tokenizer(added=False).save_pretrained(folder)
    assert "placeholder" in failed(verify(folder, hashes=False))
    assert "placeholder" not in failed(verify(folder, parts="vision", hashes=False))
