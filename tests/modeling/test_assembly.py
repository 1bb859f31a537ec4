"""Path B: a chat model out of parts, whatever the parts come from."""

import copy
import json
from pathlib import Path

import pytest
import torch
from assembled import FP32, assemble, example, language, vision
from foreign_towers import composite, vision_tower
from safetensors.torch import load_file, save_file
from tiny_chat import tokenizer
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from internvl_engine import (
    InternVL_G,
    VisionLanguageModel,
    accelerate,
)
from internvl_engine.assets import nano_directory
from internvl_engine.processing.special_tokens import SPECIAL_TOKENS

from models import VISION, model, pixels

GOLDEN = Path(__file__).parents[1] / "golden" / "chat"
CHAT = ("qwen2_300m_v2", "internlm2_300m_dynamic", "llama_6b_v1", "phi3_300m_su_long",
        "qwen3_300m_tied", "hf_qwen2_6b", "hf_qwen3_300m")  # fmt: skip
IMAGES = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_model_of_two_directories(tmp_path):
    vision().save_pretrained(tmp_path / "vision")
    language().save_pretrained(tmp_path / "language")
    tokenizer(added=False).save_pretrained(tmp_path / "language")
    built = VisionLanguageModel.from_parts(
        vision=str(tmp_path / "vision"), language=tmp_path / "language", template="internvl2_5",
        dynamic_image_size=True, min_dynamic_patch=2, **FP32,
    )  # fmt: skip
    assert not built.training
    config = built.config
    assert (config.template, config.dynamic_image_size, config.use_thumbnail) == (
        "internvl2_5", True, False,
    )  # fmt: skip
    assert (config.min_dynamic_patch, config.max_dynamic_patch) == (2, 12)
    assert (config.ps_version, config.select_layer, config.downsample_ratio) == ("v2", -1, 0.5)
    assert (config.force_image_size, config.image_size, built.num_image_token) == (28, 28, 4)
    assert config.llm_architecture == "LlamaForCausalLM"
    assert config.llm_config.vocab_size == len(built.tokenizer) == 349
    assert built.img_context_token_id == config.img_context_token_id == 342
    for name, weight in vision().state_dict().items():
        assert torch.equal(built.vision_model.state_dict()[name], weight), name
    for name, weight in language().state_dict().items():
        assert torch.equal(built.language_model.state_dict()[name][:340], weight), name
    whole = VisionLanguageModel(config).eval()
    whole.load_state_dict(built.state_dict())
    assert torch.equal(whole(**example(built)).logits, built(**example(built)).logits)


def test_the_projector_starts_as_pytorchs_own_and_in_float32():
    parts = vision(), language()
    torch.manual_seed(3)
    built = VisionLanguageModel.from_parts(*parts, dtype="bfloat16")
    assert [type(each) for each in built.mlp1] == [nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear]
    assert built.mlp_projector is built.mlp1
    torch.manual_seed(3)
    expected = nn.Sequential(nn.LayerNorm(192), nn.Linear(192, 32), nn.GELU(), nn.Linear(32, 32))
    for ours, theirs in zip(built.mlp1.parameters(), expected.parameters(), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)
    towers = {p.dtype for n, p in built.named_parameters() if not n.startswith("mlp1.")}
    assert towers == {torch.bfloat16}


def test_a_float32_projector_between_bfloat16_towers_trains():
    built = assemble(dtype=torch.bfloat16)
    inputs = example(built)
    outputs = built(**inputs, labels=inputs["input_ids"])
    assert outputs.logits.isfinite().all()
    outputs.loss.backward()
    assert {p.grad.dtype for p in built.mlp1.parameters()} == {torch.float32}
    assert all(p.grad.any() for p in built.mlp1.parameters())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        close = built(**inputs).logits
    assert torch.nn.functional.cosine_similarity(close, outputs.logits, dim=-1).min() > 0.999
    assert built.generate(**inputs, max_new_tokens=3).shape == (1, 3)


def stored(name):
    """A tower's published names, as loaded whole."""
    whole = VisionLanguageModel.from_pretrained(GOLDEN / name, **FP32)
    return whole, whole.vision_model, whole.language_model


@pytest.mark.golden
@pytest.mark.parametrize("name", CHAT)
@torch.no_grad()
def test_towers_out_of_chat_checkpoints(name):
    whole, tower, words = stored(name)
    built = VisionLanguageModel.from_parts(
        vision=GOLDEN / name, language=GOLDEN / name, projector=GOLDEN / name, **FP32,
        ps_version=whole.config.ps_version, select_layer=whole.config.select_layer,
        force_image_size=whole.config.image_size,
    )  # fmt: skip
    images, ids = pixels(side=whole.config.image_size), torch.arange(3, 23)[None]
    expected = tower(images).last_hidden_state
    torch.testing.assert_close(built.vision_model(images).last_hidden_state, expected)
    assert torch.equal(built.language_model(ids).logits, words(ids).logits)
    assert torch.equal(built.extract_feature(images), whole.extract_feature(images))
    assert built.config.llm_architecture == whole.config.llm_architecture
    assert built.tokenizer is None and built.img_context_token_id is None
    with pytest.raises(ValueError, match="set model.img_context_token_id"):
        built(images[:1], ids)


def test_lora_in_a_checkpoint_is_merged_where_it_is_asked_to():
    source, options = GOLDEN / "internlm2_lora", {**FP32, "trust_remote_code": True}
    with pytest.raises(ValueError, match="pass merge_lora=True"):
        VisionLanguageModel.from_parts(source, source, **options)
    built = VisionLanguageModel.from_parts(source, source, source, merge_lora=True, **options)
    merged = VisionLanguageModel.from_pretrained(GOLDEN / "internlm2_lora_merged", **FP32)
    assert built.config.use_llm_lora == built.config.use_backbone_lora == 0
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(built.state_dict()[name], weight, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_bare_internlm2_directory(tmp_path):
    """As its own repository has it: packed wqkv, and a class that only remote code has."""
    source = GOLDEN / "internlm2_300m_dynamic"
    config = json.loads((source / "config.json").read_text())["llm_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    start = "language_model."
    state = load_file(source / "model.safetensors")
    state = {n.removeprefix(start): t for n, t in state.items() if n.startswith(start)}
    assert any("wqkv" in name for name in state)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    built = VisionLanguageModel.from_parts(vision(), tmp_path, **FP32)
    assert type(built.language_model) is LlamaForCausalLM
    assert built.config.llm_architecture == "InternLM2ForCausalLM"
    # Longer than what it was trained for: the base of its rotary embedding grows.
    ids = torch.randint(3, 50, (1, 2 * built.config.llm_config.max_position_embeddings))
    _, _, words = stored("internlm2_300m_dynamic")
    assert torch.equal(built.language_model(ids).logits, words(ids).logits)


class PublishedTower(nn.Module):
    """Remote code's, with its names and without our class."""

    def __init__(self):
        super().__init__()
        ours = vision()
        self.config, self.embeddings, self.encoder = ours.config, ours.embeddings, ours.encoder

    def forward(self, pixel_values):
        return self.encoder(self.embeddings(pixel_values))


VISION_OBJECTS = {
    "the published tower": PublishedTower,
    "an InternViT": vision,
    "an InternVL-14B": lambda: model(vision_config=VISION),
    "a chat model": lambda: assemble(),
    "transformers' tower": lambda: vision_tower(num_hidden_layers=2, qk_norm_eps=1e-6),
    "transformers' chat model": composite,
}


@pytest.mark.parametrize("kind", VISION_OBJECTS)
@torch.no_grad()
def test_a_vision_tower_in_an_object(kind):
    given = VISION_OBJECTS[kind]()
    inner = getattr(given, "model", given)
    tower = getattr(inner, "vision_model", getattr(inner, "vision_tower", inner))
    expected = tower(pixel_values=IMAGES).last_hidden_state
    built = assemble(vision=given)
    torch.testing.assert_close(built.vision_model(IMAGES).last_hidden_state, expected)
    if "transformers" in kind:
        ours, theirs = built.vision_model.embeddings, tower.embeddings
        assert ours.class_embedding.data_ptr() == theirs.cls_token.data_ptr()  # shared
    elif "published" in kind:
        ours, theirs = (each.encoder.layers[0].attn.qkv for each in (built.vision_model, tower))
        assert ours.weight.data_ptr() == theirs.weight.data_ptr()
    else:
        assert built.vision_model is tower


@torch.no_grad()
def test_a_vision_tower_of_a_stored_14b():
    whole = InternVL_G.from_pretrained(nano_directory(), **FP32)
    built = assemble(vision=nano_directory(), **FP32)
    expected = whole.vision_model(IMAGES).last_hidden_state
    assert torch.equal(built.vision_model(IMAGES).last_hidden_state, expected)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2"])
@torch.no_grad()
def test_any_causal_language_model(kind):
    fields = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
              "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 340,
              "pad_token_id": 0}  # fmt: skip
    from transformers import AutoConfig

    words = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).eval()
    built = assemble(language=words)
    assert built.language_model is words
    inputs = example(built)
    answer = built.generate(**inputs, max_new_tokens=4, do_sample=False)
    embeds = words.get_input_embeddings()(inputs["input_ids"])
    embeds[0, 1:5] = built.extract_feature(inputs["pixel_values"])[0]
    expected = words.generate(inputs_embeds=embeds, max_new_tokens=4, do_sample=False)
    assert torch.equal(answer, expected)


@pytest.mark.parametrize("tie", [False, True], ids=["separate", "tied"])
@pytest.mark.parametrize("vocab", [340, 349, 400], ids=["grows", "fits", "shrinks"])
def test_embedding_rows_of_the_new_tokens(vocab, tie):
    words = language(vocab, tie)
    before = copy.deepcopy(words.state_dict())
    built = assemble(language=words)
    table = words.get_input_embeddings().weight
    head = words.get_output_embeddings().weight
    assert table.shape == head.shape == (349, 32)
    assert words.config.vocab_size == 349
    assert table.requires_grad and head.requires_grad
    assert (head is table) is tie
    assert torch.equal(head[:340], before["lm_head.weight"][:340])
    mean = head[:340].mean(0).expand(9, -1)
    torch.testing.assert_close(head[340:], mean)
    if not tie:
        kept = min(vocab, 349)
        assert torch.equal(table[:kept], before["model.embed_tokens.weight"][:kept])
        if vocab == 340:
            assert 0.015 < table[340:].std() < 0.025
            assert table[340:].unique().numel() == 9 * 32
    ids = built.tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(340, 349))


def test_rows_stay_where_no_token_is_new():
    words = language(400)
    before = copy.deepcopy(words.state_dict())
    built = assemble(language=words, tokenizer=tokenizer(added=True))
    assert all(torch.equal(words.state_dict()[n], t) for n, t in before.items())
    assert built.img_context_token_id == 342
    short = language(340)
    assemble(language=short, tokenizer=tokenizer(added=True))
    assert short.get_output_embeddings().weight.shape == (349, 32)
    head = short.get_output_embeddings().weight
    torch.testing.assert_close(head[340:], head[:340].mean(0).expand(9, -1))


def test_a_tokenizer_from_its_own_directory(tmp_path):
    tokenizer(added=False).save_pretrained(tmp_path)
    built = assemble(tokenizer=str(tmp_path))
    assert len(built.tokenizer) == 349
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        assemble(tokenizer=tmp_path / "nowhere")
    without = assemble(tokenizer=None)
    assert without.tokenizer is None
    assert without.config.llm_config.vocab_size == 340


@pytest.mark.parametrize("prefix", ["", "mlp1.", "mlp_projector.", "module.mlp1."])
@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
def test_a_trained_projector_from_a_file(prefix, ending, tmp_path):
    trained = assemble().mlp1
    state = {prefix + name: tensor.clone() for name, tensor in trained.state_dict().items()}
    path = tmp_path / f"mlp{ending}"
    save_file(state, path) if ending == ".safetensors" else torch.save(state, path)
    built = assemble(projector=path, dtype="bfloat16")
    for name, weight in trained.state_dict().items():
        assert torch.equal(built.mlp1.state_dict()[name], weight)


def test_a_trained_projector_as_a_module():
    trained = assemble().mlp1
    assert assemble(projector=trained).mlp1 is trained


@torch.no_grad()
@pytest.mark.parametrize("size", [14, 42, 56])
def test_the_position_table_and_the_configuration_are_resized(size):
    built = assemble(force_image_size=size)
    table = built.vision_model.embeddings.position_embedding
    assert table.shape == (1, 1 + (size // 7) ** 2, 48)
    assert table.requires_grad
    assert built.config.vision_config.image_size == built.config.force_image_size == size
    assert built.num_image_token == (size // 14) ** 2
    images = pixels(side=size)
    expected = vision()(images).last_hidden_state  # interpolates at run time
    torch.testing.assert_close(built.vision_model(images).last_hidden_state, expected)


@pytest.mark.parametrize("own, size", [(28, 28), (224, 448), (364, 448), (448, 448)])
def test_the_size_of_tiles_where_nobody_says(own, size):
    tower = vision(image_size=own, patch_size=14)
    built = assemble(vision=tower)
    assert (built.config.image_size, tower.config.image_size) == (size, size)
    assert built.num_image_token == (size // 28) ** 2


@torch.no_grad()
@pytest.mark.parametrize("layout", ["published", "transformers"])
@pytest.mark.parametrize("tie", [False, True], ids=["separate", "tied"])
def test_saved_and_loaded_again(tie, layout, tmp_path):
    built = assemble(language=language(tie=tie), force_image_size=42, template="Hermes-2")
    inputs = example(built, side=42)
    built.save_pretrained(tmp_path, layout=layout)
    loaded = VisionLanguageModel.from_pretrained(tmp_path, **FP32)
    assert torch.equal(loaded(**inputs).logits, built(**inputs).logits)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in built.state_dict().items())
    assert loaded.img_context_token_id == 342
    written = json.loads((tmp_path / "config.json").read_text())["architectures"]
    if layout == "published":
        assert written == ["InternVLChatModel"]
        assert type(AutoModel.from_pretrained(tmp_path)) is VisionLanguageModel
    else:
        assert written == ["InternVLForConditionalGeneration"]
    for name in ("template", "force_image_size", "max_dynamic_patch", "ps_version"):
        assert getattr(loaded.config, name) == getattr(built.config, name), name
    from internvl_engine.processing.chat_tokenizer import load_tokenizer

    assert load_tokenizer(tmp_path).get_vocab() == built.tokenizer.get_vocab()


@torch.no_grad()
def test_transformers_own_class_loads_an_assembled_model(tmp_path):
    transformers = pytest.importorskip("transformers", minversion="4.52")
    built = assemble(vision=vision(qk_norm_eps=1e-6))
    built.save_pretrained(tmp_path, layout="transformers")
    theirs = transformers.InternVLForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs = example(built)
    torch.testing.assert_close(
        theirs(**inputs).logits, built(**inputs).logits, rtol=1e-5, atol=1e-5
    )


def test_drop_path():
    built = assemble(vision=vision(num_hidden_layers=3), drop_path_rate=0.4)
    rates = [getattr(layer.drop_path1, "rate", 0) for layer in built.vision_model.encoder.layers]
    assert rates == [0, 0.2, 0.4]
    assert built.config.vision_config.drop_path_rate == 0.4
    kept = assemble(vision=vision(drop_path_rate=0.3))
    assert kept.vision_model.encoder.layers[-1].drop_path2.rate == 0.3


@torch.no_grad()
def test_accelerated_as_eager():
    built = assemble()
    expected = built(**example(built)).logits
    assert accelerate(built).replaced
    torch.testing.assert_close(built(**example(built)).logits, expected, rtol=1e-4, atol=1e-5)
    again = assemble(vision=built, language=built)
    assert again.language_model is built.language_model
    assert again(**example(again)).logits.shape == expected.shape
