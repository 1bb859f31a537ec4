"""Quantized checkpoints: written in every form, mapped as they lie, and what is wrong with them."""

import json

import pytest
import torch
from chat_folders import assert_alike, folder_of, recorded
from published_layout import write_published
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from internvl_engine.acceleration import accelerate
from internvl_engine.assets import nano_directory
from internvl_engine.checkpoint import CheckpointError, load_language_model
from internvl_engine.checkpoint.files import open_weights
from internvl_engine.configuration import InternVLConfig
from internvl_engine.conversion import convert
from internvl_engine.modeling import InternVisionModel, InternVL_C, InternVL_G
from internvl_engine.modeling.chat import VisionLanguageModel
from internvl_engine.schemes import SCHEMES, Rule, Scheme
from internvl_engine.weights import Int4Tensor, Int8Tensor, QuantizedTensor

from golden_vectors import load_golden

FP32 = {"dtype": torch.float32}
FORMS = ("int8", "int4", "fp8")
# Of models so small that the schemes leave them wide.
TINY = {name: Scheme(f"tiny {name}", SCHEMES[name].rules, min_size=1) for name in FORMS}
LAYER = "qllama.model.layers.1"
PACKED = f"{LAYER}.self_attn.k_proj.weight"
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture(scope="session")
def stored(tmp_path_factory):
    """The embedded model in every form; not to be changed."""
    folder = tmp_path_factory.mktemp("quantized")
    for form in FORMS:
        convert(nano_directory(), folder / form, quantize=form)
    return folder


@pytest.fixture
def folder(tmp_path, stored):
    """The embedded model in int8, to be damaged."""
    path = tmp_path / "copy"
    path.mkdir()
    for name in (WEIGHTS, CONFIG):
        (path / name).write_bytes((stored / "int8" / name).read_bytes())
    return path


def change(folder, **tensors):
    """Other tensors in the file; None takes one out."""
    state = load_file(folder / WEIGHTS) | tensors
    save_file({n: t for n, t in state.items() if t is not None}, folder / WEIGHTS)


def edit(folder, **fields):
    config = json.loads((folder / CONFIG).read_text())
    config["quantization_config"] |= fields
    (folder / CONFIG).write_text(json.dumps(config))


def quantized(model):
    return {n: p for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)}


def assert_same_forms(ours, theirs):
    """The same weights in the same forms, bit for bit; of the wide ones the same values."""
    ours, theirs = (dict(m.named_parameters(remove_duplicate=False)) for m in (ours, theirs))
    assert set(ours) == set(theirs)
    for name, weight in ours.items():
        assert type(weight) is type(theirs[name]), name
        if isinstance(weight, QuantizedTensor):
            for inner, tensor in weight.inner_tensors().items():
                other = theirs[name].inner_tensors()[inner]
                assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), name
        else:
            assert torch.equal(weight, theirs[name]), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_stored_is_what_loading_makes_of_wide_weights(stored, form, dtype):
    mapped = InternVL_G.from_pretrained(stored / form, dtype=dtype)
    made = InternVL_G.from_pretrained(nano_directory(), quantize=form, dtype=dtype)
    assert_same_forms(mapped, made)
    assert {type(p).FORM for p in quantized(mapped).values()} >= {form}
    assert all(p.dtype == dtype and not p.requires_grad for p in mapped.parameters() if p.ndim == 2
               and isinstance(p, QuantizedTensor))  # fmt: skip
    pixels = torch.randn(2, 3, 28, 28, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(mapped.encode_image(pixels), made.encode_image(pixels))


def test_the_configuration_says_how(stored):
    found = json.loads((stored / "int4" / CONFIG).read_text())["quantization_config"]
    assert found == {"quant_method": "internvl_engine", "version": 1, "scheme": "int4",
                     "dtype": "bfloat16"}  # fmt: skip
    assert (stored / "int4" / "tokenizer.model").is_file()
    forms = {n: type(p) for n, p in quantized(InternVL_G.from_pretrained(stored / "int4")).items()}
    assert forms[PACKED] is Int4Tensor and forms["qllama.lm_head.weight"] is Int8Tensor
    assert forms["vision_model.encoder.layers.0.mlp.fc1.weight"] is Int8Tensor


@pytest.mark.parametrize("form", FORMS)
def test_files_are_aligned_and_have_neighbours_side_by_side(stored, form):
    path = stored / form / WEIGHTS
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8:start])
    places = {n: at["data_offsets"] for n, at in header.items() if n != "__metadata__"}
    odd = min(end for begin, end in places.values() if (end - begin) % 64)
    for begin, _ in places.values():
        assert begin >= odd or (start + begin) % 64 == 0
    group = [f"{LAYER}.self_attn.{x}_proj.weight" for x in "qkv"]
    for one, other in zip(group, group[1:], strict=False):
        assert places[one][1] == places[other][0]
    with safe_open(path, "pt") as file:  # the library reads it, too
        assert set(file.keys()) == set(places)
        packed = file.get_tensor(PACKED)
    ours = open_weights(path).read(PACKED)
    assert torch.equal(ours.view(torch.uint8), packed.view(torch.uint8))


def test_neighbours_are_mapped_as_one(tmp_path):
    """Widths of whole panels: the three weights are ranges of one storage, in shards too."""
    convert(wide_model(tmp_path / "a"), tmp_path / "b", quantize="int8", max_shard_size="100KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    layers = InternVL_G.from_pretrained(tmp_path / "b").qllama.model.layers
    for layer in layers:
        q, k, v = (getattr(layer.self_attn, f"{x}_proj").weight for x in "qkv")
        for inner in ("packed", "scales", "sums"):
            one, two, three = (getattr(x, inner) for x in (q, k, v))
            assert one.data_ptr() + one.nbytes == two.data_ptr()
            assert two.data_ptr() + two.nbytes == three.data_ptr()
            storages = {x.untyped_storage().data_ptr() for x in (one, two, three)}
            assert len(storages) == 1
            assert one.untyped_storage().nbytes() == one.nbytes + two.nbytes + three.nbytes


def wide_model(folder):
    config = InternVLConfig.from_preset("nano")
    config.qllama_config.hidden_size, config.qllama_config.num_attention_heads = 64, 4
    config.qllama_config.head_dim = 16
    InternVL_G(InternVLConfig(**config.to_dict())).bfloat16().save_pretrained(folder)
    return folder


def test_towers_and_parts(stored):
    whole = InternVL_G.from_pretrained(stored / "int8", **FP32)
    tower = InternVisionModel.from_pretrained(stored / "int8", **FP32)
    assert_same_forms(tower, whole.vision_model)
    text = InternVL_C.from_pretrained(stored / "int8", parts="text", **FP32)
    assert quantized(text) and not any("vision" in name for name in quantized(text))
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        expected = whole.vision_model(pixels).last_hidden_state
        assert torch.equal(tower(pixels).last_hidden_state, expected)


def test_a_part_or_a_tower_can_be_written(tmp_path):
    convert(nano_directory(), tmp_path / "image", quantize="int8", parts="image")
    model = InternVL_C.from_pretrained(tmp_path / "image", **FP32)
    assert model.config.parts == "image" and quantized(model)
    convert(nano_directory(), tmp_path / "tower", quantize="int8", model_class=InternVisionModel)
    tower = InternVisionModel.from_pretrained(tmp_path / "tower", **FP32)
    assert_same_forms(tower, model.vision_model)


def test_lora_stays_wide_above_a_quantized_weight(tmp_path):
    pytest.importorskip("peft")
    golden = load_golden("lora_encode_G")
    source = write_published(tmp_path / "a", golden)
    convert(source, tmp_path / "b", quantize=TINY["int8"])
    model = InternVL_G.from_pretrained(tmp_path / "b", **FP32)
    assert_same_forms(model, InternVL_G.from_pretrained(source, quantize=TINY["int8"], **FP32))
    assert any(".base_layer." in name for name in quantized(model))
    assert not any("lora_" in name for name in quantized(model))
    with pytest.raises(CheckpointError, match="LoRA cannot be merged into a quantized weight"):
        InternVL_G.from_pretrained(tmp_path / "b", merge_lora=True)


@pytest.mark.golden
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize(
    "case", ["internlm2_300m_dynamic", "qwen3_300m_tied", "hf_qwen2_6b", "phi3_300m_su_long"]
)
def test_chats(tmp_path, case):
    """In our own names, whatever the names were: q, k and v of InternLM2 are three tensors."""
    source = folder_of(tmp_path / "a", case)
    convert(source, tmp_path / "b", quantize=TINY["int4"])
    mapped = VisionLanguageModel.from_pretrained(tmp_path / "b", **FP32)
    made = VisionLanguageModel.from_pretrained(source, quantize=TINY["int4"], **FP32)
    assert_same_forms(mapped, made)
    assert {Int4Tensor, Int8Tensor} == {type(p) for p in quantized(mapped).values()}
    tied = mapped.language_model.lm_head.weight is mapped.get_input_embeddings().weight
    assert tied == (case == "qwen3_300m_tied")
    language = load_language_model(tmp_path / "b", **FP32)
    ids = recorded(case)[0]["in.input_ids"][:, :12]
    with torch.no_grad():
        assert_alike(language(ids).logits, mapped.language_model(ids).logits)
    with pytest.raises(ValueError, match="quantized weights are in the published layout"):
        convert(source, tmp_path / "c", quantize="int8", layout="transformers")


DAMAGE = {
    "scales are missing": (
        {f"{PACKED}.scales": None},
        f"{PACKED} in .*{WEIGHTS}: a quantized weight in int8 .*got packed, sums: missing scales",
    ),
    "all beside it is missing": (
        {f"{PACKED}.scales": None, f"{PACKED}.sums": None},
        f"{PACKED} in .*{WEIGHTS}: a quantized weight in int8 .*: missing scales, sums",
    ),
    "scales of other rows": (
        {f"{PACKED}.scales": torch.ones(7)}, f"{PACKED} in .*{WEIGHTS}: Int8Tensor: a weight",
    ),
    "of another layout": (
        {PACKED: torch.zeros(80, 80, dtype=torch.int8)}, f"{PACKED} in .*: Int8Tensor: a weight",
    ),
    "of another dtype": (
        {f"{PACKED}.sums": torch.zeros(80)}, f"{PACKED} in .*: Int8Tensor: a weight",
    ),
    "wide in a place of its own": ({PACKED: torch.zeros(81, 80)}, f"{PACKED} in .*{WEIGHTS}"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_names_file_and_weight(folder, damage):
    tensors, message = DAMAGE[damage]
    change(folder, **tensors)
    with pytest.raises(CheckpointError, match=message):
        InternVL_G.from_pretrained(folder)


def test_a_weight_that_is_missing(folder):
    change(folder, **{PACKED: None})
    with pytest.raises(CheckpointError, match=f"missing: {PACKED}"):
        InternVL_G.from_pretrained(folder)


def test_a_truncated_file(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: not a complete safetensors file"):
        InternVL_G.from_pretrained(folder)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"version": 2}, "of layout 2, this internvl_engine reads layout 1: quantize"),
        ({"version": None}, "of layout None"),
        ({"scheme": "int3"}, "its quantization_config is not one of ours .*int3"),
        ({"quant_method": "awq", "bits": 8}, "quantized with AWQ, 8 bits.*not supported: take the"),
    ],
)
def test_another_layout_or_method(folder, fields, message):
    edit(folder, **fields)
    with pytest.raises(CheckpointError, match=message):
        InternVL_G.from_pretrained(folder)


def test_weights_without_their_configuration_are_called_so(folder):
    config = json.loads((folder / CONFIG).read_text())
    del config["quantization_config"]
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="internvl_engine, whose config.json is not beside"):
        InternVL_G.from_pretrained(folder)


def test_two_schemes_contradict(stored, tmp_path):
    assert_same_forms(
        InternVL_G.from_pretrained(stored / "int8", quantize="int8"),
        InternVL_G.from_pretrained(stored / "int8"),
    )
    with pytest.raises(
        ValueError, match="quantize='int4', but its weights are quantized by 'int8'"
    ):
        InternVL_G.from_pretrained(stored / "int8", quantize="int4")
    with pytest.raises(ValueError, match="quantize must be one of int8, int4, fp8"):
        InternVL_G.from_pretrained(nano_directory(), quantize="int2")
    with pytest.raises(CheckpointError, match="were quantized .int8., and the bits that they lost"):
        convert(stored / "int8", tmp_path / "out")


def test_disk_and_quantize_contradict():
    with pytest.raises(ValueError, match="goes to disk, and quantize= leaves nothing there"):
        InternVL_G.from_pretrained(nano_directory(), quantize="int8", device_map={"": "disk"})


def test_a_stored_form_is_read_from_disk_by_blocks(stored):
    """Blocks on disk stay mapped, and are right when their turn comes."""
    bf16 = {"dtype": torch.bfloat16}
    model = InternVL_G.from_pretrained(stored / "int8", device_map={"": "disk"}, **bf16)
    expected = InternVL_G.from_pretrained(stored / "int8", **bf16)
    pixels = torch.randn(1, 3, 28, 28, **bf16)
    with torch.no_grad():
        assert torch.equal(model.encode_image(pixels), expected.encode_image(pixels))


@pytest.mark.parametrize("form", FORMS)
def test_saving_as_held(stored, tmp_path, form):
    """The same bits, whether a model was loaded so or quantized since, fused or not."""
    model = InternVL_G.from_pretrained(stored / form, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "a", quantized=True)
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (stored / form / WEIGHTS).read_bytes()
    wide = InternVL_G.from_pretrained(nano_directory(), dtype=torch.bfloat16)
    report = accelerate(wide, quantize=form)
    if report.weights and form != "fp8":  # which a processor is not given
        wide.save_pretrained(tmp_path / "b", quantized=True)
        again = InternVL_G.from_pretrained(tmp_path / "b", dtype=torch.bfloat16)
        assert_same_forms(again, model)
        found = json.loads((tmp_path / "b" / CONFIG).read_text())["quantization_config"]
        assert found["scheme"] == form


def test_saving_wide(stored, tmp_path):
    """Values in the dtype that they compute in; what is loaded again asks for no quantization."""
    model = InternVL_G.from_pretrained(stored / "int8", **FP32)
    model.save_pretrained(tmp_path / "a", max_shard_size="500KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    again = InternVL_G.from_pretrained(tmp_path / "a", **FP32)
    assert not quantized(again)
    for name, weight in model.named_parameters():
        values = weight.dense() if isinstance(weight, QuantizedTensor) else weight
        assert torch.equal(again.get_parameter(name), values), name
    with pytest.raises(CheckpointError, match="quantized=True, but no weight of this InternVL_G"):
        again.save_pretrained(tmp_path / "b", quantized=True)


def test_a_scheme_of_ones_own_is_kept_by_name(tmp_path):
    rules = (Rule("fc1", "int4", group=128), Rule("lm_head", "int8"))
    model = InternVL_G.from_pretrained(nano_directory(), quantize=Scheme("mine", rules))
    forms = {(p.FORM, *p.options.values()) for p in quantized(model).values()}
    assert forms == {("int4", 64), ("int8",)}  # one group of 64 columns, or of 128
    model.save_pretrained(tmp_path / "a", quantized=True)
    again = InternVL_G.from_pretrained(tmp_path / "a")
    assert_same_forms(again, model)
    convert(nano_directory(), tmp_path / "b", quantize=Scheme("mine", rules))
    assert_same_forms(InternVL_G.from_pretrained(tmp_path / "b"), model)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["internlm2_300m_dynamic", "qwen3_300m_tied", "hf_qwen2_6b"])
def test_saving_chats(tmp_path, case):
    source = folder_of(tmp_path / "a", case)
    model = VisionLanguageModel.from_pretrained(source, quantize=TINY["int8"], **FP32)
    model.save_pretrained(tmp_path / "b", quantized=True)
    assert_same_forms(VisionLanguageModel.from_pretrained(tmp_path / "b", **FP32), model)
    model.save_pretrained(tmp_path / "c")  # in the layout that it came in
    again = VisionLanguageModel.from_pretrained(tmp_path / "c", **FP32)
    name = "vision_model.encoder.layers.0.attn.qkv.weight"
    assert torch.equal(again.get_parameter(name), model.get_parameter(name).dense())
