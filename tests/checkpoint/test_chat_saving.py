"""Chat models saved in either layout: to the bit, and for each maker's own code to load."""

import json
import shutil

import pytest
import torch
from chat_folders import (
    CASES,
    CHATS,
    OF_TRANSFORMERS,
    PUBLISHED,
    WEIGHTS,
    assert_alike,
    assert_recorded,
    assert_same_bits,
    dtype_of,
    folder_of,
    logits,
    recorded,
    state_of,
)
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, InternVLForConditionalGeneration
from transformers.models.internvl.configuration_internvl import InternVLConfig

import internvl_engine
from internvl_engine.checkpoint import CheckpointError
from internvl_engine.checkpoint.writing import INDEX, Planned, write_shards
from internvl_engine.modeling.chat import VisionLanguageModel

pytestmark = [pytest.mark.golden, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")]
FP32 = {"dtype": torch.float32}
INTERNLM = "internlm2_300m_dynamic"
BOTH_LAYOUTS = [c for c in PUBLISHED if c not in ("llama_6b_v1", "internlm2_lora")]


def load(folder, case, **options):
    """A recorded checkpoint with the placeholder's id, as a tokenizer beside it would give it."""
    folder_of(folder, case)
    token = {"<IMG_CONTEXT>": recorded(case)[1]["img_context_token_id"]}
    (folder / "added_tokens.json").write_text(json.dumps(token))
    return VisionLanguageModel.from_pretrained(folder, dtype=dtype_of(case), **options)


@pytest.mark.parametrize("case", CASES)
def test_what_was_loaded_is_saved_to_the_bit(tmp_path, case):
    """The whole file, header and all, in the layout that it came in."""
    if "lora" in case:
        pytest.importorskip("peft")
    load(tmp_path / "a", case).save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == (CHATS / case / WEIGHTS).read_bytes()
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    stored = json.loads((CHATS / case / "config.json").read_text())
    for name in ("model_type", "architectures", "select_layer", "ps_version", "force_image_size",
                 "use_llm_lora", "use_backbone_lora", "template", "image_token_id",
                 "image_seq_length"):  # fmt: skip
        if name in stored:
            assert config[name] == stored[name], name
    again = VisionLanguageModel.from_pretrained(tmp_path / "b", dtype=dtype_of(case))
    assert_recorded(again, case)


@pytest.mark.parametrize("case", BOTH_LAYOUTS)
def test_published_to_transformers_and_back(tmp_path, case):
    model = load(tmp_path / "a", case)
    model.save_pretrained(tmp_path / "b", layout="transformers")
    again = VisionLanguageModel.from_pretrained(tmp_path / "b", dtype=dtype_of(case))
    assert again.origin.layout == "transformers"
    again.save_pretrained(tmp_path / "c", layout="published")
    assert_same_bits(tmp_path / "c", state_of(case))
    last = VisionLanguageModel.from_pretrained(tmp_path / "c", dtype=dtype_of(case))
    assert last.origin.layout == "published"
    assert_alike(logits(last, case), logits(model, case))


@pytest.mark.parametrize("case", OF_TRANSFORMERS)
def test_transformers_to_published_and_back(tmp_path, case):
    load(tmp_path / "a", case).save_pretrained(tmp_path / "b", layout="published")
    again = VisionLanguageModel.from_pretrained(tmp_path / "b", **FP32)
    assert again.config.template == "internvl2_5"
    again.save_pretrained(tmp_path / "c", layout="transformers")
    assert_same_bits(tmp_path / "c", state_of(case))


def their_logits(model, case):
    """What transformers' class makes of the recorded batch, without the tiles whose flag is 0."""
    tensors, _ = recorded(case)
    pixels, flags = tensors["in.pixel_values"], tensors.get("in.image_flags")
    inputs = {n: tensors[f"in.{n}"] for n in ("input_ids", "attention_mask", "position_ids")
              if f"in.{n}" in tensors}  # fmt: skip
    used = pixels if flags is None else pixels[flags.flatten().bool()]
    with torch.no_grad():
        logits = model(pixel_values=used.to(model.dtype), **inputs).logits
    return logits[inputs["attention_mask"].bool()].float()


@pytest.mark.parametrize("case", [*BOTH_LAYOUTS, *OF_TRANSFORMERS, "internlm2_lora"])
def test_transformers_own_class_loads_what_was_saved(tmp_path, case):
    model = load(tmp_path / "a", case, merge_lora="lora" in case)
    model.save_pretrained(tmp_path / "b", layout="transformers", max_shard_size="200KB")
    assert (tmp_path / "b" / INDEX).is_file()
    theirs, info = InternVLForConditionalGeneration.from_pretrained(
        tmp_path / "b", torch_dtype=dtype_of(case), output_loading_info=True
    )
    assert not any(info.values()), info
    assert theirs.dtype == dtype_of(case)
    expected, actual = their_logits(theirs, case), logits(model, case).float()
    if dtype_of(case) == torch.float32:
        assert (actual - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)
    else:
        assert torch.cosine_similarity(actual.flatten(), expected.flatten(), dim=0) > 0.9997
    stored = InternVLConfig.from_pretrained(tmp_path / "b")
    assert stored.image_seq_length == model.num_image_token
    assert theirs.generation_config.eos_token_id == model.config.llm_config.eos_token_id


@pytest.mark.parametrize("case", ["qwen2_300m_v2", INTERNLM, "llama_6b_v1", "phi3_300m_su_long"])
def test_accelerated_models_save_the_same_bits(tmp_path, case):
    model = load(tmp_path / "a", case)
    training = internvl_engine.accelerate(model, mode="training")
    model.save_pretrained(tmp_path / "training")
    assert_same_bits(tmp_path / "training", state_of(case))
    training.undo()
    report = internvl_engine.accelerate(model)
    assert any(type(p).__name__ == "PackedTensor" for p in model.parameters()), str(report)
    model.save_pretrained(tmp_path / "b")
    assert_same_bits(tmp_path / "b", state_of(case))
    if case == INTERNLM:
        model.save_pretrained(tmp_path / "c", layout="transformers")
        report.undo()
        model.save_pretrained(tmp_path / "d", layout="transformers")
        assert_same_bits(tmp_path / "c", load_file(tmp_path / "d" / WEIGHTS))


def test_offloaded_models_save_the_same_bits(tmp_path):
    device_map = {"": "cpu", "language_model": "disk", "vision_model.encoder": "disk"}
    model = load(tmp_path / "a", INTERNLM, device_map=device_map, offload_folder=tmp_path / "o")
    model.save_pretrained(tmp_path / "b")
    assert_same_bits(tmp_path / "b", state_of(INTERNLM))


@pytest.mark.parametrize("parts", ["vision", "language"])
def test_parts(tmp_path, parts):
    for case in (INTERNLM, "hf_qwen2_6b"):
        model = load(tmp_path / case, case, parts=parts)
        model.save_pretrained(tmp_path / case / "b")
        again = VisionLanguageModel.from_pretrained(tmp_path / case / "b", **FP32)
        assert again.config.parts == parts
        for name, tensor in again.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name
        with pytest.raises(ValueError, match=f"holds whole models, .* parts='{parts}'"):
            model.save_pretrained(tmp_path / "c", layout="transformers")


def test_a_tied_head_is_written_where_the_published_class_ties_none(tmp_path):
    """Their Qwen2 draws a head at random where the file has none; Qwen3's code ties it."""
    name = "language_model.lm_head.weight"
    without = folder_of(
        tmp_path / "a", "qwen2_300m_v2", lambda s: {n: s[n] for n in s if n != name},
        llm_config={"tie_word_embeddings": True}, tie_word_embeddings=True,
    )  # fmt: skip
    model = VisionLanguageModel.from_pretrained(without, **FP32)
    model.img_context_token_id = model.config.img_context_token_id = 123
    model.save_pretrained(tmp_path / "b")
    state = load_file(tmp_path / "b" / WEIGHTS)
    assert torch.equal(state[name], state["language_model.model.embed_tokens.weight"])
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["llm_config"]["tie_word_embeddings"] is False
    model.save_pretrained(tmp_path / "c", layout="transformers")
    assert name not in load_file(tmp_path / "c" / WEIGHTS)
    theirs = InternVLForConditionalGeneration.from_pretrained(tmp_path / "c", torch_dtype="float32")
    assert theirs.lm_head.weight is theirs.get_input_embeddings().weight
    assert model.config.tie_word_embeddings is True  # saving changes nothing


def test_lora_of_its_own_on_q_k_and_v(tmp_path):
    """Saved as the published code's LLaMA, whose linears LoRA can be on separately."""
    pytest.importorskip("peft")
    case = INTERNLM
    model = load(tmp_path / "a", case)
    model.wrap_llm_lora(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.1)
    expected = logits(model.eval(), case)
    model.save_pretrained(tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["llm_config"]["architectures"] == ["LlamaForCausalLM"]
    assert config["llm_config"]["model_type"] == "llama" and "auto_map" not in config["llm_config"]
    assert (config["use_llm_lora"], config["use_backbone_lora"]) == (4, 0)
    names = load_file(tmp_path / "b" / WEIGHTS)
    start = "language_model.base_model.model.model.layers.0.self_attn.k_proj"
    assert {n for n in names if n.startswith(start)} == {
        f"{start}.{end}.weight" for end in ("base_layer", "lora_A.default", "lora_B.default")
    }
    again = VisionLanguageModel.from_pretrained(tmp_path / "b", **FP32)
    assert_alike(logits(again, case), expected)
    with pytest.raises(ValueError, match="transformers' layout has no LoRA.*merge_lora=True"):
        model.save_pretrained(tmp_path / "c", layout="transformers")
    model.language_model = model.language_model.merge_and_unload()
    model.save_pretrained(tmp_path / "d")  # as InternLM2 again, without LoRA
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert config["llm_config"]["architectures"] == ["InternLM2ForCausalLM"]
    assert config["use_llm_lora"] == 0
    merged = VisionLanguageModel.from_pretrained(tmp_path / "d", **FP32)
    torch.testing.assert_close(logits(merged, case), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:backbone_lora_alpha is 20")
def test_another_alpha_is_kept_and_said(tmp_path):
    pytest.importorskip("peft")
    case = "internlm2_lora"
    model = load(tmp_path / "a", case, lora_alpha=20)  # of both towers
    with pytest.warns(
        UserWarning, match="llm_lora_alpha is 20.*published code takes 2 [*] rank, 12"
    ):
        model.save_pretrained(tmp_path / "b")
    again = VisionLanguageModel.from_pretrained(tmp_path / "b", **FP32)
    assert_alike(logits(again, case), logits(model, case))


def test_only_what_is_there_is_refused(tmp_path):
    model = load(tmp_path / "a", "llama_6b_v1")
    with pytest.raises(ValueError, match="pixel shuffle v2 only"):
        model.save_pretrained(tmp_path / "b", layout="transformers")
    with pytest.raises(ValueError, match="layout must be 'published' or 'transformers', got 'hf'"):
        model.save_pretrained(tmp_path / "b", layout="hf")
    with pytest.raises(ValueError, match="safe_serialization=False is not supported"):
        model.save_pretrained(tmp_path / "b", safe_serialization=False)
    with pytest.raises(TypeError, match="flavour is no argument"):
        model.save_pretrained(tmp_path / "b", flavour="new")
    assert not (tmp_path / "b").exists()
    model.save_pretrained(tmp_path / "b", is_main_process=False, safe_serialization=True)
    assert not (tmp_path / "b").exists()


def test_a_placeholder_that_was_set_on_the_model(tmp_path):
    model = VisionLanguageModel.from_pretrained(folder_of(tmp_path / "a", INTERNLM), **FP32)
    with pytest.raises(ValueError, match="stores the id of <IMG_CONTEXT>"):
        model.save_pretrained(tmp_path / "b", layout="transformers")
    model.img_context_token_id = 114
    model.save_pretrained(tmp_path / "b", layout="transformers")
    again = VisionLanguageModel.from_pretrained(tmp_path / "b", **FP32)
    assert again.img_context_token_id == again.config.img_context_token_id == 114


def test_a_state_that_a_trainer_gathered(tmp_path):
    model = load(tmp_path / "a", INTERNLM)
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "b", state_dict=state)
    again = VisionLanguageModel.from_pretrained(tmp_path / "b", **FP32)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_the_files_beside_the_weights_come_along(tmp_path):
    model = load(tmp_path / "a", INTERNLM)
    for name in ("tokenizer.model", "preprocessor_config.json", "generation_config.json"):
        (tmp_path / "a" / name).write_text(name)
    model.save_pretrained(tmp_path / "b")
    assert {path.name for path in (tmp_path / "b").iterdir()} == {
        WEIGHTS, "config.json", "added_tokens.json", "tokenizer.model", "preprocessor_config.json",
        "generation_config.json",
    }  # fmt: skip
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert not {"auto_map", "system_message", "_name_or_path"} & set(config)
    (tmp_path / "a" / "modeling_internvl_chat.py").write_text("raise SystemExit")
    model.save_pretrained(tmp_path / "b")
    stored = json.loads((tmp_path / "a" / "config.json").read_text())
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["auto_map"] == stored["auto_map"]
    assert (tmp_path / "b" / "modeling_internvl_chat.py").is_file()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "tokenizer.model").write_text("of the user")
    model.save_pretrained(tmp_path / "c", layout="transformers")
    assert (tmp_path / "c" / "tokenizer.model").read_text() == "of the user"
    assert not (tmp_path / "c" / "preprocessor_config.json").exists()  # it says another thing there
    assert (
        json.loads((tmp_path / "c" / "generation_config.json").read_text())["eos_token_id"] == 108
    )


@pytest.mark.parametrize("sizes", [("100KB", "100KB"), ("5GB", "100KB"), ("100KB", "5GB")])
def test_saving_over_a_checkpoint(tmp_path, sizes):
    """Also over the very files that the weights are pages of."""
    model = load(tmp_path / "a", INTERNLM)
    model.save_pretrained(tmp_path / "b", max_shard_size=sizes[0])
    model = VisionLanguageModel.from_pretrained(tmp_path / "b", **FP32)
    model.save_pretrained(tmp_path / "b", max_shard_size=sizes[1])
    assert_same_bits(tmp_path / "b", state_of(INTERNLM))
    names = {path.name for path in tmp_path.joinpath("b").glob("*.safetensors*")}
    assert (WEIGHTS in names) != (INDEX in names)
    model.save_pretrained(tmp_path / "b", max_shard_size="300KB")  # fewer shards
    assert_same_bits(tmp_path / "b", state_of(INTERNLM))


@pytest.mark.parametrize("size", ["5GB", "100KB"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_save_leaves_the_older_checkpoint(tmp_path, size, error):
    model = load(tmp_path / "a", INTERNLM)
    model.save_pretrained(tmp_path / "b", max_shard_size=size)
    before = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    planned = [Planned(f"t{i}", (20_000,), torch.float32) for i in range(9)]

    def read(name):
        if name == "t7":
            raise error
        return torch.ones(20_000)

    with pytest.raises(error):
        write_shards(tmp_path / "b", planned, read, 100_000)
    assert {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} == before
    VisionLanguageModel.from_pretrained(tmp_path / "b")


def test_a_save_that_is_killed_between_its_files_is_seen(tmp_path, monkeypatch):
    """New shards never pass for the old ones: the index is gone while they take their names."""
    model = load(tmp_path / "a", INTERNLM)
    model.save_pretrained(tmp_path / "b", max_shard_size="100KB")
    monkeypatch.setattr(
        "internvl_engine.checkpoint.writing.write_text",
        lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
    )
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path / "b", max_shard_size="100KB")
    with pytest.raises(CheckpointError, match="no model.safetensors.index.json says how these"):
        VisionLanguageModel.from_pretrained(tmp_path / "b")


def test_no_room(tmp_path, monkeypatch):
    model = load(tmp_path / "a", INTERNLM)
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"b: needed [\d,]+ bytes of room, there are 10"):
        model.save_pretrained(tmp_path / "b")


def test_what_transformers_layout_has_no_place_for(tmp_path):
    scaling = {"type": "yarn", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    source = folder_of(tmp_path / "a", "phi3_300m_su_long", llm_config={"rope_scaling": scaling})
    model = VisionLanguageModel.from_pretrained(source, dtype=torch.float32)
    with pytest.raises(ValueError, match="'yarn'.*layout='published'"):
        model.save_pretrained(tmp_path / "b", layout="transformers")
    small = GPT2Config(n_embd=48, n_layer=1, n_head=4, vocab_size=130)
    other = load(tmp_path / "c", "qwen2_300m_v2")
    other = VisionLanguageModel.from_parts(other.vision_model, GPT2LMHeadModel(small))
    other.img_context_token_id = 3
    with pytest.raises(ValueError, match="this GPT2 has language_model.transformer.*'published'"):
        other.save_pretrained(tmp_path / "d", layout="transformers")
    other.save_pretrained(tmp_path / "e", layout="published")
    again = VisionLanguageModel.from_pretrained(tmp_path / "e", dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        found, expected = (m.eval()(input_ids=ids).logits for m in (again, other))
    torch.testing.assert_close(found, expected)
