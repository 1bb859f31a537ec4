"""Chat checkpoints: every layout gives the model that the recorded outputs are of."""

import json

import pytest
import torch
from chat_folders import (
    CASES,
    PUBLISHED,
    assert_alike,
    assert_recorded,
    dtype_of,
    folder_of,
    recorded,
    state_of,
)
from safetensors.torch import load_file

from internvl_engine.checkpoint import CheckpointError, Contents, PartNotLoadedError, Source
from internvl_engine.checkpoint.grouping import PIECES, Heads, heads_of, pack, take
from internvl_engine.checkpoint.layouts import INTERNLM2
from internvl_engine.checkpoint.names import translate
from internvl_engine.checkpoint.rewriting import rewrite
from internvl_engine.checkpoint.writing import Planned
from internvl_engine.modeling import InternVisionModel
from internvl_engine.modeling.chat import VisionLanguageModel

pytestmark = [pytest.mark.golden, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")]
FP32 = {"dtype": torch.float32}
INTERNLM = "internlm2_300m_dynamic"
WQKV = "language_model.model.layers.1.attention.wqkv.weight"


@pytest.mark.parametrize("case", CASES)
def test_recorded_checkpoints(tmp_path, case):
    if "lora" in case:
        pytest.importorskip("peft")
    shards = 1 if case.startswith("qwen") else 3
    model = VisionLanguageModel.from_pretrained(
        folder_of(tmp_path, case, shards=shards), dtype=dtype_of(case)
    )
    assert not model.training and model.dtype == dtype_of(case)
    assert_recorded(model, case)


@pytest.mark.parametrize("case", ["hf_qwen2_6b", "hf_qwen3_300m"])
def test_names_in_memory_of_transformers(tmp_path, case):
    """As state_dict() has them, whatever version of transformers saved it."""

    def in_memory(state):
        renamed = {f"model.{name}": tensor for name, tensor in state.items()}
        return {
            name.replace("language_model.model.", "language_model.").replace(
                "model.language_model.lm_head", "lm_head"
            ): tensor
            for name, tensor in renamed.items()
        }

    model = VisionLanguageModel.from_pretrained(folder_of(tmp_path, case, in_memory), **FP32)
    assert_recorded(model, case)


def test_q_k_and_v_in_one_tensor():
    """The formula of the specification, head by head, on numbers that tell where they come from."""
    heads, width = Heads(query=6, key=2), 4
    packed = torch.arange(2 * 5 * width * 3).reshape(2 * 5 * width, 3).float()
    groups = packed.view(2, 5, width, 3)
    q, k, v = (take(packed, piece, heads) for piece in PIECES)
    for head in range(6):
        group, place = divmod(head, 3)
        assert torch.equal(q[head * width : (head + 1) * width], groups[group, place])
    for head in range(2):
        assert torch.equal(k[head * width : (head + 1) * width], groups[head, 3])
        assert torch.equal(v[head * width : (head + 1) * width], groups[head, 4])
    assert torch.equal(pack(q, k, v, heads), packed)
    for case in (Heads(4, 4), Heads(4, 1), Heads(1, 1)):
        packed = torch.randn(2 * (case.query + 2 * case.key))  # a bias
        pieces = [take(packed, piece, case) for piece in PIECES]
        assert [len(piece) for piece in pieces] == [2 * case.query, 2 * case.key, 2 * case.key]
        assert torch.equal(pack(*pieces, case), packed)


def test_heads_that_a_configuration_states():
    assert heads_of({"num_attention_heads": 8, "num_key_value_heads": 2}) == (8, 2)
    assert heads_of({"num_attention_heads": 8, "num_key_value_heads": None}) == (8, 8)
    assert heads_of({"n_head": 8}) is None


def test_biases_of_internlm2(tmp_path):
    def biased(state):
        biases = {
            name.replace(".weight", ".bias"): torch.randn(len(tensor))
            for name, tensor in state.items()
            if name.endswith((".wqkv.weight", ".wo.weight"))
        }
        return state | biases

    folder = folder_of(tmp_path, INTERNLM, biased, llm_config={"bias": True})
    model = VisionLanguageModel.from_pretrained(folder, **FP32)
    stored = load_file(folder / "model.safetensors")[WQKV.replace("weight", "bias")]
    heads = Heads(6, 2)
    attention = model.language_model.model.layers[1].self_attn
    for piece in PIECES:
        bias = getattr(attention, f"{piece}_proj").bias
        assert torch.equal(bias, take(stored, piece, heads)), piece


def test_lora_on_a_packed_projection(tmp_path):
    """Gradients are those of the published parameters: lora_A is one tensor of three linears."""
    pytest.importorskip("peft")
    case = "internlm2_lora"
    model = VisionLanguageModel.from_pretrained(folder_of(tmp_path, case), **FP32)
    tensors, about = recorded(case)
    model.img_context_token_id = about["img_context_token_id"]
    names = ("pixel_values", "input_ids", "attention_mask", "image_flags", "labels")
    model(**{name: tensors[f"in.{name}"] for name in names}).loss.backward()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    planned = [Planned(n, tuple(t.shape), t.dtype) for n, t in gradients.items()]
    targets = rewrite(planned, INTERNLM2, Heads(4, 2))
    expected = {n.removeprefix("out.grad."): t for n, t in tensors.items() if ".lora_" in n}
    assert len(expected) == 4
    for name, gradient in expected.items():
        actual = targets[name].read(gradients.__getitem__)
        assert (actual - gradient).abs().max() < 5e-5 * max(1, gradient.abs().max()), name
    attention = model.language_model.get_base_model().model.layers[0].self_attn
    shared = {id(getattr(attention, f"{p}_proj").lora_A["default"].weight) for p in PIECES}
    assert len(shared) == 1


def test_merged_lora(tmp_path):
    merged = VisionLanguageModel.from_pretrained(
        folder_of(tmp_path, "internlm2_lora"), merge_lora=True, **FP32
    )
    assert merged.config.use_llm_lora == merged.config.use_backbone_lora == 0
    assert_recorded(merged, "internlm2_lora")
    folder = folder_of(tmp_path / "merged", "internlm2_lora_merged")
    expected = VisionLanguageModel.from_pretrained(folder, **FP32).state_dict()
    assert set(merged.state_dict()) == set(expected)
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


def test_a_vision_tower_with_lora(tmp_path):
    folder = folder_of(tmp_path, "internlm2_lora")
    with pytest.raises(CheckpointError, match="pass merge_lora=True"):
        InternVisionModel.from_pretrained(folder)
    tower = InternVisionModel.from_pretrained(folder, merge_lora=True, **FP32)
    whole = VisionLanguageModel.from_pretrained(folder, merge_lora=True, **FP32).vision_model
    for name, tensor in tower.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name
    half = VisionLanguageModel.from_pretrained(folder, merge_lora=True, parts="vision", **FP32)
    assert half.config.use_backbone_lora == half.config.use_llm_lora == 0


def test_a_table_for_another_size_than_the_configuration_says(tmp_path):
    case = "qwen2_300m_v2"
    folder = folder_of(tmp_path, case, vision_config={"image_size": 56})
    with pytest.warns(UserWarning, match="says 56 px, the position table is for 28 px; taking 28"):
        model = VisionLanguageModel.from_pretrained(folder, **FP32)
    assert model.config.vision_config.image_size == 28
    assert_recorded(model, case)


def test_a_head_in_no_file_is_the_embedding(tmp_path):
    folder = folder_of(
        tmp_path,
        "qwen2_300m_v2",
        lambda state: {n: t for n, t in state.items() if not n.endswith("lm_head.weight")},
    )
    with pytest.warns(UserWarning, match="no language_model.lm_head.weight, so .*embed_tokens"):
        model = VisionLanguageModel.from_pretrained(folder, **FP32).language_model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True


def test_a_head_in_the_file_is_a_tensor_of_its_own(tmp_path):
    def with_head(state):
        name = "language_model.model.embed_tokens.weight"
        return state | {"language_model.lm_head.weight": state[name] + 1}

    folder = folder_of(tmp_path, "qwen3_300m_tied", with_head)
    model = VisionLanguageModel.from_pretrained(folder, **FP32).language_model
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight + 1)


@pytest.mark.parametrize("case", [INTERNLM, "hf_qwen2_6b"])
def test_parts(tmp_path, case):
    folder = folder_of(tmp_path, case, shards=2)
    whole = VisionLanguageModel.from_pretrained(folder, **FP32)
    pixels = recorded(case)[0]["in.pixel_values"]
    ids = torch.tensor([[1, 5, 9]])
    vision = VisionLanguageModel.from_pretrained(folder, parts="vision", **FP32)
    language = VisionLanguageModel.from_pretrained(folder, parts="language", **FP32)
    with torch.no_grad():
        assert_alike(vision.extract_feature(pixels), whole.extract_feature(pixels))
        assert_alike(language(input_ids=ids).logits, whole(input_ids=ids).logits)
    assert {name.partition(".")[0] for name in vision.state_dict()} == {"vision_model", "mlp1"}
    with pytest.raises(PartNotLoadedError, match="load with parts='language' or 'all'"):
        vision(input_ids=ids)
    with pytest.raises(PartNotLoadedError, match="load with parts='vision' or 'all'"):
        language.extract_feature(pixels)
    with pytest.raises(ValueError, match="parts must be one of vision, language, all, got 'text'"):
        VisionLanguageModel.from_pretrained(folder, parts="text")


@pytest.mark.parametrize("case", [INTERNLM, "llama_6b_v1", "hf_qwen3_300m"])
def test_the_vision_tower_alone(tmp_path, case):
    folder = folder_of(tmp_path, case)
    tower = InternVisionModel.from_pretrained(folder, **FP32)
    whole = VisionLanguageModel.from_pretrained(folder, **FP32).vision_model
    pixels = recorded(case)[0]["in.pixel_values"]
    with torch.no_grad():
        assert_alike(tower(pixels)[0], whole(pixels)[0])


@pytest.mark.parametrize(
    "device_map",
    [
        {"": "cpu", "language_model.model.layers.1": "disk", "vision_model.encoder": "disk"},
        {"": "disk"},
        "balanced",
        "auto",
    ],
    ids=str,
)
@pytest.mark.parametrize("case", [INTERNLM, "internlm2_lora", "qwen3_300m_tied"])
def test_spread_and_offloaded(tmp_path, case, device_map):
    model = VisionLanguageModel.from_pretrained(
        folder_of(tmp_path / "a", case), device_map=device_map, offload_folder=tmp_path / "b",
        **FP32,
    )  # fmt: skip
    assert_recorded(model, case)


def test_overrides_of_the_configuration(tmp_path):
    case = "qwen2_300m_v2"
    options = {
        "template": "Hermes-2", "select_layer": -2, "dynamic_image_size": False,
        "use_thumbnail": False, "ps_version": "v1", "min_dynamic_patch": 2, "max_dynamic_patch": 9,
        "drop_path_rate": 0.25, "downsample_ratio": 0.5, "pad2square": True,
    }  # fmt: skip
    model = VisionLanguageModel.from_pretrained(folder_of(tmp_path, case), **options, **FP32)
    assert model.config.vision_config.drop_path_rate == options.pop("drop_path_rate")
    assert {name: getattr(model.config, name) for name in options} == options
    assert model.vision_model.encoder.layers[-1].drop_path1.rate == 0.25
    for bad, message in [
        ({"downsample_ratio": 0.25}, "was made for 0.5"),
        ({"ps_version": "v3"}, "ps_version must be v1 or v2"),
        ({"select_layer": 40}, "select_layer must be from"),
        ({"foo": 1}, "foo is neither an argument nor a field"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            VisionLanguageModel.from_pretrained(tmp_path, **bad)


@pytest.mark.parametrize("case", ["llama_6b_resize", "hf_qwen2_6b"])
def test_another_size_of_images_resizes_the_table(tmp_path, case):
    """The table is resized once; without the keyword it is interpolated at every call, alike."""
    folder = folder_of(tmp_path, case)
    as_stored = VisionLanguageModel.from_pretrained(folder, **FP32)
    assert as_stored.vision_model.config.image_size == 28
    resized = VisionLanguageModel.from_pretrained(folder, force_image_size=42, **FP32)
    assert resized.vision_model.embeddings.position_embedding.shape[1] == 37
    assert resized.config.force_image_size == resized.config.vision_config.image_size == 42
    assert resized.num_image_token == 9
    pixels = torch.randn(2, 3, 42, 42)
    with torch.no_grad():
        expected = as_stored.extract_feature(pixels)
        torch.testing.assert_close(resized.extract_feature(pixels), expected, rtol=1e-5, atol=1e-5)
    same = VisionLanguageModel.from_pretrained(folder, force_image_size=28, **FP32)
    assert same.config.image_size == same.vision_model.embeddings.image_size == 28


def test_keywords_of_model_cards(tmp_path):
    model = VisionLanguageModel.from_pretrained(
        folder_of(tmp_path, "qwen2_300m_v2"), torch_dtype=torch.float32, low_cpu_mem_usage=True,
        use_flash_attn=True, trust_remote_code=True, load_in_8bit=False, device_map=None,
    )  # fmt: skip
    assert_recorded(model, "qwen2_300m_v2")


TOKENIZERS = {
    "tokenizer.json": {"added_tokens": [{"id": 3, "content": "<s>"},
                                        {"id": 114, "content": "<IMG_CONTEXT>"}]},
    "added_tokens.json": {"<img>": 112, "<IMG_CONTEXT>": 114},
    "tokenizer_config.json": {"added_tokens_decoder": {"114": {"content": "<IMG_CONTEXT>"}}},
}  # fmt: skip


@pytest.mark.parametrize("name", [None, *TOKENIZERS])
def test_the_placeholder_of_the_tokenizer(tmp_path, name):
    folder = folder_of(tmp_path, INTERNLM)
    (folder / "special_tokens_map.json").write_text("{}")
    if name is not None:
        (folder / name).write_text(json.dumps(TOKENIZERS[name]))
    model = VisionLanguageModel.from_pretrained(folder, **FP32)
    assert model.img_context_token_id == (None if name is None else 114)
    assert model.config.img_context_token_id == model.img_context_token_id


def test_the_placeholder_of_the_configuration_comes_first(tmp_path):
    folder = folder_of(tmp_path, "hf_qwen2_6b")
    (folder / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": 7}))
    assert VisionLanguageModel.from_pretrained(folder, **FP32).img_context_token_id == 113


def test_damage_names_file_and_key(tmp_path):
    folder = folder_of(tmp_path / "cut", INTERNLM, shards=3)
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="model-00002-of-00003.* not a complete safetensors"):
        VisionLanguageModel.from_pretrained(folder)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003"):
        VisionLanguageModel.from_pretrained(folder)
    for rows in (3, 16):
        folder = folder_of(tmp_path / "b", INTERNLM, lambda s, r=rows: s | {WQKV: s[WQKV][:-r]})
        with pytest.raises(CheckpointError, match=f"{WQKV} in .* 6 heads that share 2 key heads"):
            VisionLanguageModel.from_pretrained(folder)
    folder = folder_of(tmp_path / "b", INTERNLM, lambda s: s | {WQKV: s[WQKV][:-10]})
    with pytest.raises(CheckpointError, match=r"q of .*wqkv.* needed shape \(48, 48\), got \(42, "):
        VisionLanguageModel.from_pretrained(folder)
    without = folder_of(tmp_path / "c", INTERNLM, lambda s: {n: s[n] for n in s if n != WQKV})
    with pytest.raises(CheckpointError, match=r"3 weights are missing: .*1\.self_attn\.k_proj"):
        VisionLanguageModel.from_pretrained(without)


def test_packed_heads_without_a_configuration(tmp_path):
    folder = folder_of(tmp_path, INTERNLM)
    source = Source.find(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="wqkv.*num_attention_heads and num_key_value_heads"):
        Contents.read(source, source.weights())
    names = Contents.read(source, source.weights(), lambda name: name.startswith("vision"))
    assert "language_model.model.layers.1.self_attn.q_proj.weight" in names.names


def test_weights_are_pages_of_the_file(tmp_path):
    """Nothing but what is taken apart occupies memory of its own."""
    folder = folder_of(tmp_path, "qwen2_300m_v2")
    model = VisionLanguageModel.from_pretrained(folder, **FP32)
    start, size = _mapping(folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert start <= parameter.data_ptr() < start + size, name


def _mapping(path) -> tuple[int, int]:
    """Where a file is mapped into this process."""
    with open("/proc/self/maps") as file:
        lines = [line.split() for line in file if line.rstrip().endswith(str(path))]
    first, last = lines[0][0].split("-")[0], lines[-1][0].split("-")[1]
    return int(first, 16), int(last, 16) - int(first, 16)


@pytest.mark.parametrize("case", PUBLISHED)
def test_every_stored_name_has_its_place(case):
    names = translate(state_of(case))
    used = {piece for pieces in names.stored.values() for piece in pieces}
    assert used == set(state_of(case)) and not names.doubled


def test_a_configuration_object_in_place_of_the_file(tmp_path):
    folder = folder_of(tmp_path, "phi3_300m_su_long")
    config = VisionLanguageModel.config_class.from_pretrained(folder)
    (folder / "config.json").unlink()
    model = VisionLanguageModel.from_pretrained(folder, config=config, **FP32)
    assert_recorded(model, "phi3_300m_su_long")
