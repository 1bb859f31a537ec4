import json

import pytest
from transformers import AutoConfig, LlamaConfig

from internvl_engine import InternVisionConfig, InternVLConfig
from internvl_engine.configuration import PRESETS

from models import QLLAMA, VISION, config

# What a published file holds besides: legacy generation settings and copies of nested fields.
LEGACY = {"top_k": 50, "num_beams": 1, "torch_dtype": "bfloat16", "chunk_size_feed_forward": 0}


def published(**changes) -> dict:
    """A composite config.json as published: another model_type, the frequency only nested."""
    nested = QLLAMA | {"model_type": "llama", "cross_attention_frequency": 3, **LEGACY}
    return {
        "model_type": "internvl",
        "architectures": ["InternVLModel"],
        "auto_map": {"AutoModel": "modeling_internvl.InternVLModel"},
        "vision_config": VISION | {"model_type": "intern_vit_6b", **LEGACY},
        "qllama_config": nested,
        "clip_embed_dim": 24,
        "num_query_token": 6,
        "hidden_size": 64,
        "max_txt_len": 32,
        "torch_dtype": "bfloat16",
    } | changes


def write(tmp_path, values):
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


def test_the_defaults_are_the_14b():
    made = InternVLConfig()
    vision, qllama = made.vision_config, made.qllama_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.intermediate_size) == (
        3200, 48, 12800,
    )  # fmt: skip
    assert (qllama.vocab_size, qllama.hidden_size, qllama.num_hidden_layers) == (49954, 4096, 32)
    assert (made.num_query_token, made.cross_attention_frequency, made.image_size) == (96, 2, 224)


def test_a_published_file_is_read_as_ours(tmp_path):
    read = InternVLConfig.from_pretrained(write(tmp_path, published()))
    assert read.model_type == "internvl_14b" and read.hidden_size == 64
    assert read.cross_attention_frequency == read.qllama_config.cross_attention_frequency == 3
    assert read.max_txt_len == 32 and not read.tie_word_embeddings
    vision = InternVisionConfig.from_pretrained(tmp_path)
    assert vision.hidden_size == 48 and vision.model_type == "intern_vit_6b"


@pytest.mark.parametrize(
    "top, nested, expected", [(4, 3, 4), (None, 3, 3), (None, None, 2)], ids=str
)
def test_where_the_cross_attention_frequency_comes_from(top, nested, expected):
    qllama = QLLAMA | ({} if nested is None else {"cross_attention_frequency": nested})
    made = config(qllama_config=qllama, cross_attention_frequency=top)
    assert made.cross_attention_frequency == expected
    assert made.qllama_config.cross_attention_frequency == expected


def test_what_is_saved_comes_back(tmp_path):
    made = config(cross_attention_frequency=3, force_image_size=42, use_backbone_lora=4)
    made.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert type(read) is InternVLConfig
    ours, theirs = read.to_dict(), made.to_dict()
    for name in ("cross_attention_frequency", "force_image_size", "use_backbone_lora"):
        assert ours[name] == theirs[name]
    assert ours["vision_config"]["hidden_size"] == 48 and read.image_size == 42
    assert read.qllama_config.vision_hidden_size == 48


def test_the_embeddings_are_never_tied(tmp_path):
    values = published(tie_word_embeddings=True)
    values["qllama_config"]["tie_word_embeddings"] = True
    read = InternVLConfig.from_pretrained(write(tmp_path, values))
    assert not read.tie_word_embeddings and not read.qllama_config.tie_word_embeddings


def test_ready_configurations_are_taken_as_they_are():
    qllama = LlamaConfig(**QLLAMA)
    made = InternVLConfig(vision_config=InternVisionConfig(**VISION), qllama_config=qllama)
    assert made.qllama_config is qllama and qllama.num_query_token == 96


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_built_twice(name):
    first, second = InternVLConfig.from_preset(name), InternVLConfig.from_preset(name)
    first.vision_config.image_size = 1
    assert second.vision_config.image_size != 1


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="14b-224px.*got '15b'"):
        InternVLConfig.from_preset("15b")


@pytest.mark.parametrize("field", ["llm_config", "text_config"])
def test_the_configuration_of_a_chat_is_not_taken_for_ours(tmp_path, field):
    values = published()
    values[field] = values.pop("qllama_config")
    with pytest.raises(ValueError, match=f"is a chat model's configuration \\(it has {field}\\)"):
        InternVLConfig.from_pretrained(write(tmp_path, values))
    assert InternVisionConfig.from_pretrained(tmp_path).hidden_size == 48
