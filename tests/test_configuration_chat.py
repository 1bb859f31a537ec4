"""Configurations of chat models: published dicts, transformers' dicts, and back."""

import copy
import json

import pytest
import transformers
from transformers import AutoConfig, LlamaConfig, Phi3Config, Qwen2Config, Qwen3Config

from internvl_engine import InternVisionConfig, VisionLanguageConfig

from chat_goldens import CASES, load_chat

PUBLISHED = [case for case in CASES if not case.startswith("hf_")]
OF_TRANSFORMERS = [case for case in CASES if case.startswith("hf_")]
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}
LEGACY = {  # what old transformers wrote into every nested configuration
    "attn_implementation": "flash_attention_2",
    "do_sample": True,
    "max_length": 20,
    "num_beam_groups": 1,
    "temperature": 0.2,
    "torch_dtype": "bfloat16",
    "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
}


def published(architecture="LlamaForCausalLM", model_type="llama", **llm) -> dict:
    return {
        "model_type": "internvl_chat",
        "vision_config": {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3},
        "llm_config": {"architectures": [architecture], "model_type": model_type, **SMALL, **llm},
    }


def read(values: dict) -> VisionLanguageConfig:
    return VisionLanguageConfig.from_dict(copy.deepcopy(values))  # transformers 4 writes into it


def rope(config):
    """theta and the scaling, of transformers 4 and 5."""
    scaling = getattr(config, "rope_parameters", None) or config.rope_scaling or {}
    return scaling.get("rope_theta", getattr(config, "rope_theta", None)), scaling


def test_the_defaults_are_the_published_ones():
    config = read(published())
    assert (config.select_layer, config.ps_version, config.downsample_ratio) == (-1, "v1", 0.5)
    assert config.force_image_size is config.template is config.system_message is None
    assert not (config.dynamic_image_size or config.use_thumbnail or config.pad2square)
    assert (config.min_dynamic_patch, config.max_dynamic_patch) == (1, 6)
    assert config.use_backbone_lora == config.use_llm_lora == 0
    assert config.vision_config.norm_type == "rms_norm" and config.vision_config.qk_normalization
    assert config.img_context_token_id is None and config.model_type == "internvl_chat"


@pytest.mark.parametrize("case", PUBLISHED)
def test_every_published_field_is_written_back(case):
    values = load_chat(case).config
    written = read(values).published_dict()
    json.dumps(written)
    for field, value in values.items():
        if field in ("vision_config", "llm_config"):
            for name, nested in value.items():
                if name not in ("tie_word_embeddings", "transformers_version"):
                    assert written[field][name] == nested, f"{field}.{name}"
        elif field not in ("transformers_version", "torch_dtype", "auto_map", "_commit_hash"):
            assert written[field] == value, field


@pytest.mark.parametrize("case", PUBLISHED)
def test_what_is_written_reads_the_same(case):
    config = read(load_chat(case).config)
    again = read(config.published_dict())
    assert again.published_dict() == config.published_dict()
    assert type(again.llm_config) is type(config.llm_config)
    assert again.llm_config.to_dict() == config.llm_config.to_dict()


@pytest.mark.parametrize("case", CASES)
def test_save_and_load(case, tmp_path):
    config = read(load_chat(case).config)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is VisionLanguageConfig
    assert again.llm_config.to_dict() == config.llm_config.to_dict()
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize("case", OF_TRANSFORMERS)
def test_transformers_own_reads_what_is_written_for_it(case):
    values = load_chat(case).config
    config = read(values)
    written = config.transformers_dict()
    json.dumps(written)
    for field in ("image_token_id", "image_seq_length", "vision_feature_layer", "model_type"):
        assert written[field] == values[field], field
    theirs = transformers.InternVLConfig(**written)
    expected = transformers.InternVLConfig(**values)
    for nested in ("vision_config", "text_config"):
        actual, wanted = getattr(theirs, nested).to_dict(), getattr(expected, nested).to_dict()
        differing = {n for n, v in wanted.items() if actual.get(n) != v}
        assert differing <= {"dtype", "torch_dtype", "architectures", "rope_theta"}
    assert read(written).transformers_dict() == written


def test_fields_of_transformers_vision_tower():
    values = load_chat("hf_qwen2_6b").config
    values["vision_config"]["layer_norm_eps"] = 1e-4
    vision = read(values).vision_config
    assert (vision.image_size, vision.patch_size) == (28, 7)
    assert vision.qk_normalization and not vision.qkv_bias and vision.norm_type == "rms_norm"
    assert (vision.layer_norm_eps, vision.qk_eps) == (1e-4, 1e-6)


def test_transformers_defaults_are_its_own():
    config = read({"model_type": "internvl", "vision_config": {}, "text_config": {}})
    theirs = transformers.InternVLConfig()
    assert config.vision_config.hidden_size == theirs.vision_config.hidden_size == 1024
    assert config.vision_config.norm_type == theirs.vision_config.norm_type
    assert type(config.llm_config) is type(theirs.text_config)
    assert config.img_context_token_id == theirs.image_token_id and config.ps_version == "v2"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vision_feature_layer": [1, 2]}, "one layer, got \\[1, 2\\]"),
        ({"vision_feature_select_strategy": "full"}, "without the class token.*'full'"),
        ({"vision_config": {"image_size": [28, 56]}}, "image_size must be a square"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "got a clip_vision_model"),
        ({"vision_config": {"use_mean_pooling": False}}, "use_mean_pooling must be True"),
    ],
)
def test_what_transformers_has_and_we_have_not(changes, message):
    with pytest.raises(ValueError, match=message):
        read(load_chat("hf_qwen2_6b").config | changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ps_version": "v1"}, "pixel shuffle v2 only, and this model v1"),
        ({"img_context_token_id": None}, "set config.img_context_token_id"),
        ({"vision": {"layer_norm_eps": 1e-5}}, "epsilon of 1e-06 only, and this model 1e-05"),
    ],
)
def test_what_transformers_has_not(changes, message):
    values = published() | {"ps_version": "v2", "img_context_token_id": 5}
    values["vision_config"] |= changes.pop("vision", {})
    with pytest.raises(ValueError, match=message):
        read(values | changes).transformers_dict()


def test_our_own_fields_survive_transformers_layout():
    own = {"template": "internvl2_5", "system_message": "Be brief.", "use_thumbnail": True,
           "dynamic_image_size": True, "max_dynamic_patch": 12, "force_image_size": 56}  # fmt: skip
    values = published("InternLM2ForCausalLM", "internlm2", bias=False) | own
    config = read(values | {"ps_version": "v2", "img_context_token_id": 5})
    config.vision_config.qk_norm_eps = 1e-6
    again = read(config.transformers_dict())
    assert {name: getattr(again, name) for name in own} == own
    assert again.llm_architecture == "InternLM2ForCausalLM"
    assert again.published_dict()["llm_config"]["model_type"] == "internlm2"


def test_internlm2_is_a_llama():
    scaling = {"type": "dynamic", "factor": 2.0}
    config = read(published("InternLM2ForCausalLM", "internlm2", bias=False, rope_scaling=scaling))
    llm = config.llm_config
    assert type(llm) is LlamaConfig and llm.attention_bias is False
    theta, made = rope(llm)
    assert (theta, made["rope_type"], made["factor"]) == (10000, "dynamic", 2.0)
    written = config.published_dict()["llm_config"]
    assert written["rope_scaling"] == scaling and written["bias"] is False
    assert written["rope_theta"] == 10000 and "attention_bias" not in written


def test_internlm2_has_its_own_defaults():
    values = {"architectures": ["InternLM2ForCausalLM"], "hidden_size": 64}
    llm = read({"llm_config": values}).llm_config
    assert (llm.attention_bias, llm.vocab_size, llm.rms_norm_eps) == (True, 103168, 1e-6)
    assert (llm.pad_token_id, llm.bos_token_id, llm.eos_token_id) == (0, 1, 2)


@pytest.mark.parametrize("kind", ["su", "longrope", "yarn"])
def test_phi3(kind):
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    scaling = {"type": kind, **factors}
    config = read(
        published(
            "Phi3ForCausalLM", "phi3", rope_scaling=scaling, pad_token_id=0,
            max_position_embeddings=64, original_max_position_embeddings=16,
        )
    )  # fmt: skip
    assert type(config.llm_config) is Phi3Config
    _, made = rope(config.llm_config)
    assert made.get("rope_type", made.get("type")) == "longrope"
    assert made.get("attention_factor") == (pytest.approx(1.13863) if kind == "yarn" else None)
    written = config.published_dict()["llm_config"]
    assert written["rope_scaling"] == scaling and written["original_max_position_embeddings"] == 16


def test_published_qwen2_ignores_rope_scaling_and_transformers_does_not():
    scaling = {"rope_type": "linear", "factor": 2.0}
    config = read(published("Qwen2ForCausalLM", "qwen2", rope_scaling=scaling))
    assert type(config.llm_config) is Qwen2Config
    assert rope(config.llm_config)[1].get("rope_type", "default") == "default"
    assert config.published_dict()["llm_config"]["rope_scaling"] == scaling

    values = load_chat("hf_qwen2_6b").config
    values["text_config"] |= {"rope_scaling": scaling, "rope_parameters": None}
    theirs = read(values)
    assert rope(theirs.llm_config)[1]["rope_type"] == "linear"
    assert rope(read(theirs.to_dict()).llm_config)[1]["rope_type"] == "linear"


def test_legacy_fields_do_nothing_and_are_kept():
    config = read(published("InternLM2ForCausalLM", "internlm2", **LEGACY))
    llm = config.llm_config
    assert llm._attn_implementation != "flash_attention_2"
    assert getattr(llm, "temperature", None) != 0.2 and not getattr(llm, "do_sample", False)
    written = config.published_dict()["llm_config"]
    assert {name: written[name] for name in LEGACY} == LEGACY
    config.llm_config.vocab_size = 99  # what changed meanwhile is written, not what was read
    assert config.published_dict()["llm_config"]["vocab_size"] == 99


@pytest.mark.parametrize(
    "architecture, model_type, llm, outer, tied",
    [
        ("Qwen2ForCausalLM", "qwen2", True, None, False),  # the main code ties nothing
        ("Qwen2ForCausalLM", "qwen2", True, False, False),
        ("Qwen2ForCausalLM", "qwen2", True, True, True),
        ("Qwen3ForCausalLM", "qwen3", True, None, True),  # InternVL3.5's goes by llm_config
        ("Qwen3ForCausalLM", "qwen3", True, False, False),
        ("Qwen3ForCausalLM", "qwen3", False, True, False),
    ],
)
def test_tied_embeddings(architecture, model_type, llm, outer, tied):
    values = published(architecture, model_type, tie_word_embeddings=llm)
    config = read(values if outer is None else values | {"tie_word_embeddings": outer})
    assert config.tie_word_embeddings == config.llm_config.tie_word_embeddings == tied
    again = read(config.published_dict())
    assert again.tie_word_embeddings == tied


def test_any_language_model_of_transformers():
    values = published("GPTNeoXForCausalLM", "gpt_neox")
    assert read(values).llm_config.model_type == "gpt_neox"
    del values["llm_config"]["model_type"]  # the class says it
    config = read(values)
    assert config.llm_config.model_type == "gpt_neox"
    assert config.published_dict()["llm_config"]["architectures"] == ["GPTNeoXForCausalLM"]
    qwen3 = Qwen3Config(**SMALL)
    assert VisionLanguageConfig(llm_config=qwen3).llm_config is qwen3


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ps_version": "v3"}, "ps_version must be v1 or v2, got 'v3'"),
        ({"downsample_ratio": 0.3}, "one over a whole number, got 0.3"),
        ({"select_layer": 4}, "from -4 to 3, of 3 layers"),
        ({"select_layer": -5}, "got -5"),
    ],
)
def test_values_that_no_model_has(changes, message):
    with pytest.raises(ValueError, match=message):
        read(published() | changes)


def test_an_unknown_language_model_is_named():
    with pytest.raises(ValueError, match="InternLM9ForCausalLM.*'internlm9'.*InternLM2ForCausalLM"):
        read(published("InternLM9ForCausalLM", "internlm9"))


def test_a_14b_is_not_taken_for_a_chat_model(tmp_path):
    values = {"model_type": "internvl", "qllama_config": {}, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="InternVL-14B.*which InternVLConfig takes"):
        VisionLanguageConfig.from_pretrained(tmp_path)


def test_the_vision_tower_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(load_chat("llama_6b_v1").config))
    vision = InternVisionConfig.from_pretrained(tmp_path)
    assert vision.num_hidden_layers == 6 and vision.qk_eps == vision.layer_norm_eps
