"""Names of every layout, as trainers and other packages write them, and towers out of chats."""

import json

import pytest
import torch
from published_layout import write_published
from safetensors.torch import save_file

from internvl_engine.checkpoint import CheckpointError
from internvl_engine.checkpoint.names import prefix_of, translate
from internvl_engine.modeling import InternVisionModel, InternVL_G
from internvl_engine.modeling.lora import QLLAMA_LORA

FP32 = {"dtype": torch.float32}

WRAPPERS = {
    "torch.compile": "_orig_mod.{}",
    "DistributedDataParallel": "module.{}",
    "both": "module._orig_mod.{}",
    "the other way round": "_orig_mod.module.{}",
    "Lightning": "model.{}",
    "a module of one's own": "net.backbone.{}",
    "Lightning and torch.compile": "model._orig_mod.{}",
    "FSDP": "_fsdp_wrapped_module.{}",
    "DeepSpeed inside Lightning": "_forward_module.model.{}",
    "peft around the whole": "base_model.model.{}",
}


@pytest.mark.parametrize("pattern", WRAPPERS.values(), ids=WRAPPERS)
def test_what_wraps_the_whole_model_is_stripped(tmp_path, golden_g, pattern):
    state = {pattern.format(name): tensor for name, tensor in golden_g.state.items()}
    model = InternVL_G.from_pretrained(write_published(tmp_path, golden_g, state, 1), **FP32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, golden_g.state[name]), name


@pytest.mark.parametrize(
    "inner", ["_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"]
)
def test_what_wraps_single_layers_is_stripped(tmp_path, golden_g, inner):
    state = {
        n.replace("layers.1.", f"layers.1.{inner}."): tensor for n, tensor in golden_g.state.items()
    }
    assert state.keys() != golden_g.state.keys()
    model = InternVL_G.from_pretrained(write_published(tmp_path, golden_g, state), **FP32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, golden_g.state[name]), name


@pytest.mark.parametrize("pattern", ["model.{}", "module._orig_mod.{}", "encoder.tower.{}"])
def test_what_wraps_a_tower_is_stripped(tmp_path, published, golden_g, pattern):
    tower = InternVisionModel.from_pretrained(published, **FP32)
    tower.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = {pattern.format(name): tensor for name, tensor in tower.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "last.ckpt")
    again = InternVisionModel.from_pretrained(tmp_path, **FP32)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, golden_g.state[f"vision_model.{name}"]), name


def test_what_a_trainer_saves_beside_the_model_is_named(tmp_path, golden_g):
    state = {f"model.{name}": tensor for name, tensor in golden_g.state.items()}
    state["criterion.weight"] = torch.ones(2)
    write_published(tmp_path, golden_g, state)
    with pytest.raises(CheckpointError, match="1 weights have no place .*: criterion.weight"):
        InternVL_G.from_pretrained(tmp_path)
    InternVL_G.from_pretrained(tmp_path, strict=False)


def test_averaged_weights(tmp_path, golden_g):
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 2))
    state = {f"module.{name}": tensor for name, tensor in golden_g.state.items()}
    assert set(averaged.state_dict()) == {"module.weight", "module.bias", "n_averaged"}
    state["n_averaged"] = averaged.n_averaged.reshape(1)
    model = InternVL_G.from_pretrained(write_published(tmp_path, golden_g, state), **FP32)
    assert torch.equal(model.query_tokens, golden_g.state["query_tokens"])


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_modules_that_peft_trained_whole_and_an_adapter_of_another_name(tmp_path, golden_g):
    peft = pytest.importorskip("peft")
    model = InternVL_G.from_pretrained(write_published(tmp_path / "a", golden_g), **FP32)
    model.qllama = peft.get_peft_model(
        model.qllama,
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=QLLAMA_LORA, modules_to_save=["lm_head"]),
        adapter_name="mine",
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.normal_()
    write_published(tmp_path / "b", golden_g, model.state_dict())
    again = InternVL_G.from_pretrained(tmp_path / "b", merge_lora=True, **FP32)
    merged = model.qllama.merge_and_unload()
    assert torch.equal(again.qllama.lm_head.weight, merged.lm_head.weight)
    ids = torch.tensor([[1, 5, 9, 2]])
    torch.testing.assert_close(again.qllama(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)


def test_two_models_in_one_file(tmp_path, golden_g):
    state = {f"{p}.{n}": t.clone() for p in ("model", "ema") for n, t in golden_g.state.items()}
    write_published(tmp_path, golden_g, state)
    with pytest.raises(CheckpointError, match="the model twice, below 'ema.', 'model.'"):
        InternVL_G.from_pretrained(tmp_path)


def test_flattened_parameters_of_fsdp(tmp_path, golden_g):
    state = {"_fsdp_wrapped_module._flat_param": torch.ones(9)}
    with pytest.raises(CheckpointError, match="FSDP's flattened parameters: save a full state"):
        InternVL_G.from_pretrained(write_published(tmp_path, golden_g, state))


def test_the_prefix_of_most_names():
    available = ["a.x.weight", "a.y.weight", "b.x.weight", "c.a.x.weight"]
    assert prefix_of(["x.weight", "y.weight"], available) == "a."
    assert prefix_of(["x.weight"], available) == "a."  # the shorter, then the first
    assert prefix_of(["z.weight"], available) == ""


PUBLISHED_CHAT = {
    "vision_tower.embeddings.cls_token": "vision_model.embeddings.class_embedding",
    "vision_tower.embeddings.patch_embeddings.projection.bias": (
        "vision_model.embeddings.patch_embedding.bias"
    ),
    "vision_tower.encoder.layer.3.attention.projection_layer.weight": (
        "vision_model.encoder.layers.3.attn.proj.weight"
    ),
    "vision_tower.encoder.layer.3.layernorm_after.weight": (
        "vision_model.encoder.layers.3.norm2.weight"
    ),
    "vision_tower.encoder.layer.3.lambda_1": "vision_model.encoder.layers.3.ls1",
    "multi_modal_projector.linear_2.bias": "mlp1.3.bias",
    "language_model.model.layers.0.mlp.up_proj.weight": (
        "language_model.model.layers.0.mlp.up_proj.weight"
    ),
    "language_model.lm_head.weight": "language_model.lm_head.weight",
}


@pytest.mark.parametrize("in_memory", [False, True])
def test_names_of_a_chat_in_transformers_layout(in_memory):
    stored = dict(PUBLISHED_CHAT)
    if in_memory:  # as state_dict() of transformers 5 has them
        stored = {
            f"model.{name}".replace("language_model.model.", "language_model.").replace(
                "model.language_model.lm_head", "lm_head"
            ): published
            for name, published in stored.items()
        }
    qkv = {f"{'model.' * in_memory}vision_tower.encoder.layer.3.attention.{p}_proj.bias": p
           for p in "vqk"}  # fmt: skip
    names = translate([*stored, *qkv])
    assert {published: name for name, published in stored.items()} == {
        published: pieces[0] for published, pieces in names.stored.items() if len(pieces) == 1
    }
    pieces = names.stored["vision_model.encoder.layers.3.attn.qkv.bias"]
    assert [qkv[name] for name in pieces] == ["q", "k", "v"]
    assert not names.doubled and names.layout.name == "transformers' layout"


def theirs(**changes):
    """A vision tower of transformers' InternVL, with weights that tell what they do."""
    from transformers import InternVLVisionConfig, InternVLVisionModel

    fields = {
        "hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96,
        "num_hidden_layers": 2, "image_size": [28, 28], "patch_size": [7, 7], "use_qk_norm": True,
        "attention_bias": True, "norm_type": "layer_norm",
        "use_mean_pooling": True,  # without the norm after the last layer, as published
    }  # fmt: skip
    model = InternVLVisionModel(InternVLVisionConfig(**(fields | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@torch.no_grad()
@pytest.mark.parametrize("norm_type, bias", [("rms_norm", False), ("layer_norm", True)])
@pytest.mark.parametrize("where", ["alone", "in a chat"])
def test_a_tower_of_transformers_gives_the_same_states(tmp_path, where, norm_type, bias):
    tower = theirs(norm_type=norm_type, attention_bias=bias)
    tower.save_pretrained(tmp_path)
    if where == "in a chat":
        state = {f"vision_tower.{n}": t for n, t in tower.state_dict().items()}
        state["multi_modal_projector.linear_1.bias"] = torch.ones(3)
        state["language_model.model.norm.weight"] = torch.ones(3)
        save_file(state, tmp_path / "model.safetensors")
        config = {
            "model_type": "internvl", "text_config": {},
            "vision_config": json.loads((tmp_path / "config.json").read_text()),
        }  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config))
    ours = InternVisionModel.from_pretrained(tmp_path, **FP32)
    pixels = torch.randn(2, 3, 28, 28)
    expected = tower(pixel_values=pixels).last_hidden_state
    actual = ours(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def chat(folder, golden):
    """A published chat checkpoint with the vision tower of a golden case."""
    state = {n: t for n, t in golden.state.items() if n.startswith("vision_model.")}
    state |= {"mlp1.0.weight": torch.ones(4), "language_model.model.norm.weight": torch.ones(4)}
    save_file(state, folder / "model.safetensors")
    config = {
        "model_type": "internvl_chat", "vision_config": golden.config["vision_config"],
        "llm_config": {"architectures": ["Qwen2ForCausalLM"]}, "force_image_size": 448,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_vision_tower_of_a_published_chat(tmp_path, golden_g):
    tower = InternVisionModel.from_pretrained(chat(tmp_path, golden_g), **FP32)
    assert tower.config.image_size == 28  # chats interpolate: force_image_size is not the table's
    for name, tensor in tower.state_dict().items():
        assert torch.equal(tensor, golden_g.state[f"vision_model.{name}"]), name
