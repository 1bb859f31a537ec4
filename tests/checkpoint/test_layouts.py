"""Every layout a checkpoint comes in gives the model it was made of."""

import json
import shutil

import pytest
import torch
from published_layout import write_bin, write_config, write_published
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from internvl_engine.checkpoint import CheckpointError, choose_dtype
from internvl_engine.configuration import InternVLConfig
from internvl_engine.modeling import InternVisionModel, InternVL_C, InternVL_G, InternVLModel
from internvl_engine.modeling.qllama import LlamaForCausalLM, LlamaModel

from golden_vectors import assert_golden, load_golden

pytestmark = pytest.mark.golden
FP32 = {"dtype": torch.float32}


def assert_holds(model, state, prefix=""):
    """Every weight of the model is the state's, bit by bit."""
    held = model.state_dict()
    wanted = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    assert set(held) == set(wanted)
    for name, tensor in held.items():
        assert torch.equal(tensor, wanted[name]), name


def assert_embeds(model, golden):
    with torch.no_grad():
        embeds = model.encode_image(golden.inputs["image"])
    assert_golden(embeds, golden.outputs["image_embeds"])


@pytest.mark.parametrize("shards", [1, 3])
def test_published_safetensors(tmp_path, golden_g, shards):
    model = InternVL_G.from_pretrained(write_published(tmp_path, golden_g, shards=shards), **FP32)
    assert_holds(model, golden_g.state)
    assert_embeds(model, golden_g)


@pytest.mark.parametrize("shards", [1, 2])
def test_pytorch_bin(tmp_path, golden_g, shards):
    model = InternVL_G.from_pretrained(write_bin(tmp_path, golden_g, shards), **FP32)
    assert_holds(model, golden_g.state)


def test_old_pickle_that_cannot_be_mapped(tmp_path, golden_g):
    write_config(tmp_path, golden_g.config)
    path = tmp_path / "pytorch_model.bin"
    torch.save(golden_g.state, path, _use_new_zipfile_serialization=False)
    assert_holds(InternVL_G.from_pretrained(tmp_path, **FP32), golden_g.state)


def test_a_trainers_file_wraps_the_state(tmp_path, golden_g):
    write_config(tmp_path, golden_g.config)
    state = {f"module.{name}": tensor for name, tensor in golden_g.state.items()}
    torch.save({"module": state, "global_step": 3}, tmp_path / "last.pt")
    assert_holds(InternVL_G.from_pretrained(tmp_path, **FP32), golden_g.state)


def test_a_named_file_among_others(tmp_path, golden_g):
    write_published(tmp_path, golden_g, shards=1)
    (tmp_path / "model.safetensors").rename(tmp_path / "best.safetensors")
    shutil.copy(tmp_path / "best.safetensors", tmp_path / "last.safetensors")
    with pytest.raises(CheckpointError, match="best.safetensors, last.safetensors; name one"):
        InternVL_G.from_pretrained(tmp_path)
    model = InternVL_G.from_pretrained(tmp_path / "best.safetensors", **FP32)
    assert_holds(model, golden_g.state)


def test_loaded_models_are_ready_for_inference(published, golden_g):
    model = InternVL_G.from_pretrained(str(published), **FP32)
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == model.config.dtype == torch.float32
    assert model.name_or_path == str(published)
    assert model.config.architectures == ["InternVLModel"]
    assert model.language_model.generation_config.eos_token_id == 2
    ids = model.generate(pixel_values=golden_g.inputs["image"], input_ids=torch.tensor([[1, 5]]))
    assert ids.shape[0] == len(golden_g.inputs["image"])


def test_generation_settings_come_along(tmp_path, golden_g):
    write_published(tmp_path, golden_g)
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3}))
    model = InternVL_G.from_pretrained(tmp_path)
    assert model.language_model.generation_config.max_new_tokens == 3


STANDALONE_LEFTOVERS = {
    "target_pos_embed": torch.ones(3),
    "mask_token": torch.ones(1),
    "grad_norm_square_momentum_clip": torch.ones(()),
    "grad_norm_square_momentum_sim": torch.ones(()),
    "norm3.bn.running_mean": torch.ones(4),
    "transformer.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    "transformer.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(2, 64),
    "transformer.layers.0.self_attn.q_proj.lora_B.default.weight": torch.ones(64, 2),
}


@pytest.mark.parametrize("source", ["file", "folder"])
def test_standalone_internvl_c(tmp_path, source):
    golden = load_golden("c_pytorch")
    write_config(tmp_path, golden.config)
    path = tmp_path / "internvl_c_13b_224px.pth"
    torch.save(golden.state | STANDALONE_LEFTOVERS, path)
    model, info = InternVL_C.from_pretrained(
        path if source == "file" else tmp_path, **FP32, output_loading_info=True
    )
    assert info["unexpected_keys"] == set(STANDALONE_LEFTOVERS)
    assert model.config.parts == "c"
    with torch.no_grad():
        image, text = golden.inputs["image"], golden.inputs["text"]
        assert_golden(model.encode_image(image), golden.outputs["image_embeds"])
        assert_golden(model.encode_text(text), golden.outputs["text_embeds"])
        assert_golden(model(image, text)[0], golden.outputs["logits_per_image"])


@pytest.mark.filterwarnings("ignore:.*the position table is for 56 px")
def test_standalone_without_a_configuration_is_a_14b(tmp_path):
    golden = load_golden("c_pytorch")
    torch.save(golden.state, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"c\.pth: \d+ weights are missing"):
        InternVL_C.from_pretrained(tmp_path / "c.pth")
    model = InternVL_C.from_pretrained(tmp_path / "c.pth", config=InternVLConfig(**golden.config))
    assert model.config.vision_config.hidden_size == 48


def test_old_rotary_tables_are_left_out(tmp_path, golden_g):
    old = {"qllama.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    model = InternVL_G.from_pretrained(write_published(tmp_path, golden_g, golden_g.state | old))
    assert model.dtype in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    "kind, prefix",
    [
        (InternVisionModel, "vision_model."),
        (LlamaForCausalLM, "qllama."),
        (LlamaModel, "qllama.model."),
    ],
)
def test_a_tower_out_of_the_composite_and_alone(tmp_path, published, golden_g, kind, prefix):
    tower = kind.from_pretrained(published, **FP32)
    assert_holds(tower, golden_g.state, prefix)
    tower.save_pretrained(tmp_path)
    assert_holds(kind.from_pretrained(tmp_path, **FP32), golden_g.state, prefix)


def test_a_tower_needs_only_its_own_shards(tmp_path, golden_g):
    write_published(tmp_path, golden_g)
    vision = {n: t for n, t in golden_g.state.items() if n.startswith("vision_model.")}
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    save_file(vision, tmp_path / "vision.safetensors")
    weight_map = {n: f"{'vision' if n in vision else 'rest'}.safetensors" for n in golden_g.state}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    tower = InternVisionModel.from_pretrained(tmp_path, **FP32)
    assert_holds(tower, golden_g.state, "vision_model.")
    with pytest.raises(FileNotFoundError, match="rest.safetensors"):
        InternVL_G.from_pretrained(tmp_path)


def test_the_head_of_the_decoder_alone_without_its_head(tmp_path, published, golden_g):
    LlamaForCausalLM.from_pretrained(published, **FP32).save_pretrained(tmp_path)
    decoder = LlamaModel.from_pretrained(tmp_path, **FP32)
    assert_holds(decoder, golden_g.state, "qllama.model.")


@pytest.mark.parametrize("kind", [InternVLModel, InternVL_C, InternVL_G])
def test_auto_classes_serve_what_was_saved(tmp_path, published, golden_g, kind):
    kind.from_pretrained(published, **FP32).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "internvl_14b"
    assert isinstance(AutoConfig.from_pretrained(tmp_path), InternVLConfig)
    model = AutoModel.from_pretrained(tmp_path, **FP32)
    assert type(model) is kind
    assert_holds(model, golden_g.state)


def test_auto_model_serves_a_vision_tower(tmp_path, published, golden_g):
    InternVisionModel.from_pretrained(published, **FP32).save_pretrained(tmp_path)
    tower = AutoModel.from_pretrained(tmp_path, **FP32)
    assert type(tower) is InternVisionModel
    assert_holds(tower, golden_g.state, "vision_model.")


def test_saving_over_the_files_one_was_loaded_from(tmp_path, golden_g):
    write_published(tmp_path, golden_g, shards=1)
    model = InternVL_G.from_pretrained(tmp_path, **FP32)  # its weights are pages of the file
    model.save_pretrained(tmp_path)
    assert_holds(model, golden_g.state)
    assert_holds(InternVL_G.from_pretrained(tmp_path, **FP32), golden_g.state)


def test_saving_in_shards(tmp_path, published, golden_g):
    model = InternVL_G.from_pretrained(published, **FP32)
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_holds(InternVL_G.from_pretrained(tmp_path, **FP32), golden_g.state)


def test_training_never_writes_into_the_file(tmp_path, golden_g):
    write_published(tmp_path, golden_g, shards=1)
    model = InternVL_G.from_pretrained(tmp_path, **FP32)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.train().encode_image(golden_g.inputs["image"]).square().sum().backward()
    optimizer.step()
    moved = model.clip_projector.cross_attn.proj.weight
    assert not torch.equal(moved, golden_g.state["clip_projector.cross_attn.proj.weight"])
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(tensor, golden_g.state[name]), name


def test_embedding_and_head_stay_two_tensors(tmp_path, golden_g):
    write_published(tmp_path, golden_g)  # without the flag, for which transformers would tie (K1)
    model = InternVL_G.from_pretrained(tmp_path, **FP32)
    embedding, head = model.qllama.model.embed_tokens.weight, model.qllama.lm_head.weight
    assert torch.equal(embedding, golden_g.state["qllama.model.embed_tokens.weight"])
    assert torch.equal(head, golden_g.state["qllama.lm_head.weight"])
    assert not torch.equal(embedding, head)


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.float16", torch.float64, "bf16"])
def test_dtypes_by_name(published, golden_g, dtype):
    model = InternVL_G.from_pretrained(published, dtype=dtype)
    wanted = getattr(torch, str(dtype).removeprefix("torch.").replace("bf16", "bfloat16"))
    expected = {name: tensor.to(wanted) for name, tensor in golden_g.state.items()}
    assert_holds(model, expected)


def test_dtype_auto_is_what_the_processor_computes_in(published, monkeypatch):
    reasons = {
        True: "bfloat16: the processor multiplies it in hardware",
        False: "float32: the processor does not multiply bfloat16 in hardware, which takes AVX512-"
        "BF16, AMX, or bf16 on Arm; dtype='bfloat16' takes half the memory",
    }
    for supported, reason in reasons.items():
        monkeypatch.setattr(
            "internvl_engine.checkpoint.dtypes.computes_in_bfloat16", lambda _, s=supported: s
        )
        expected = torch.bfloat16 if supported else torch.float32
        assert str(choose_dtype("auto", torch.device("cpu"))) == reason
        assert InternVL_G.from_pretrained(published).dtype == expected
    assert InternVL_G.from_pretrained(published, torch_dtype=torch.float16).dtype == torch.float16


@pytest.mark.parametrize("dtype", ["int8", "float99", 3])
def test_dtypes_that_are_none(published, dtype):
    with pytest.raises(ValueError, match="dtype must be auto, float64"):
        InternVL_G.from_pretrained(published, dtype=dtype)


def test_a_bar_only_where_asked_for(published, capsys):
    InternVL_G.from_pretrained(published)
    assert capsys.readouterr().err == ""
    InternVL_G.from_pretrained(published, progress=True)
    assert "Loading weights" in capsys.readouterr().err
