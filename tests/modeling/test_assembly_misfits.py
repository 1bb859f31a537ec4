"""Parts that do not belong together, or are something else."""

import pytest
from assembled import FP32, assemble, language, vision
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen2Model

from internvl_engine.assets import nano_directory


def clip():
    config = CLIPVisionConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                              intermediate_size=16, image_size=28, patch_size=14)  # fmt: skip
    return CLIPVisionModel(config)


def text_model():
    return Qwen2Model(Qwen2Config(vocab_size=20, hidden_size=32, num_hidden_layers=1,
                                  num_attention_heads=2, num_key_value_heads=2))  # fmt: skip


def with_lora(side):
    built = assemble()
    built.wrap_backbone_lora(r=2) if side == "vision" else built.wrap_llm_lora(r=2)
    return built


MISFITS = {
    "size": ({"force_image_size": 30}, ValueError, "multiple of 14.*got 30"),
    "odd grid": ({"force_image_size": 35}, ValueError, "multiple of 14.*got 35"),
    "layer": ({"select_layer": -9}, ValueError, "select_layer must be from -3 to 2.*got -9"),
    "shuffle": ({"ps_version": "v3"}, ValueError, "v1 or v2, got 'v3'"),
    "ratio": ({"downsample_ratio": 0.4}, ValueError, "got 0.4"),
    "drop path": ({"drop_path_rate": 1.5}, ValueError, "from 0 to 1, got 1.5"),
    "CLIP": ({"vision": clip()}, TypeError, "with an InternViT, got CLIPVisionModel"),
    "no tower": ({"vision": nn.Linear(2, 2)}, TypeError, "vision must be.*got Linear"),
    "no head": ({"language": text_model()}, TypeError, "language must be.*got Qwen2Model"),
    "no model": ({"language": 3}, TypeError, "language must be.*got int"),
    "projector": ({"projector": 3}, TypeError, "file, a checkpoint, a module or None, got int"),
    "narrow": ({"projector": nn.Sequential(nn.LayerNorm(192), nn.Linear(192, 16), nn.GELU(),
                                           nn.Linear(16, 16))}, ValueError,
               r"1.weight \(32, 192\).*the given Sequential has.*1.weight \(16, 192\)"),
    "words": ({"tokenizer": "no/where/at/all"}, FileNotFoundError, "no/where/at/all"),
    "nowhere": ({"vision": "/no/where"}, FileNotFoundError, "/no/where"),
    "a typo": ({"force_size": 28}, TypeError, "force_size is no argument of it"),
    "quantized": ({"load_in_4bit": True}, ValueError, "load_in_4bit=True is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_parts_that_do_not_fit(case):
    options, error, message = MISFITS[case]
    with pytest.raises(error, match=message):
        assemble(**options)


def test_files_that_are_something_else(tmp_path):
    language().save_pretrained(tmp_path / "language")
    vision().save_pretrained(tmp_path / "vision")
    with pytest.raises(ValueError, match="must be an InternViT.*'llama' and no patch_size"):
        assemble(vision=tmp_path / "language", **FP32)
    with pytest.raises(ValueError, match="an InternViT vision tower alone"):
        assemble(language=tmp_path / "vision", **FP32)
    with pytest.raises(ValueError, match="InternVL-14B"):
        assemble(language=nano_directory(), **FP32)
    with pytest.raises(ValueError, match=r"no projector: needed 0.weight, .*; it has"):
        assemble(projector=tmp_path / "language")
    wide = assemble(language=language(hidden_size=64), tokenizer=None).mlp1
    save_file(wide.state_dict(), tmp_path / "wide.safetensors")
    with pytest.raises(ValueError, match=r"1.weight must have shape \(32, 192\).*\(64, 192\)"):
        assemble(projector=tmp_path / "wide.safetensors")


@pytest.mark.parametrize("side", ["vision", "language"])
def test_parts_with_lora_are_merged_first(side):
    pytest.importorskip("peft")
    given = with_lora(side)
    with pytest.raises(ValueError, match="has LoRA; merge it first"):
        assemble(**{side: given})
    tower = given.vision_model if side == "vision" else given.language_model
    assert assemble(**{side: tower.merge_and_unload()}).config.use_llm_lora == 0
