"""The model, eager and accelerated, against the published implementation's recorded outputs."""

import pytest
import torch
from safetensors.torch import load_file

from internvl_engine.acceleration import accelerate
from internvl_engine.configuration import InternVisionConfig, InternVLConfig
from internvl_engine.modeling import InternVisionModel, InternVL_C, InternVL_G, InternVLModel
from internvl_engine.modeling.masks import stage2_mask
from internvl_engine.modeling.pooling import AttentionPoolingBlock

from golden_vectors import GENERATE, GOLDEN, assert_golden, load_golden

pytestmark = pytest.mark.golden


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(params=["eager", "accelerated"])
def finish(request):
    """Leaves a loaded model as it is, or accelerates it; nothing known may stay eager."""

    def finished(model):
        if request.param == "accelerated":
            accelerate(model, strict=True)
        return model

    return finished


@pytest.fixture(autouse=True)
def not_for_bf16(request):
    """Published bf16 outputs are 0.9998 by cosine from the truth themselves; a fused model rounds
    elsewhere, and tests/test_acceleration.py compares both with the truth."""
    parameters = getattr(request.node, "callspec", None)
    if parameters and "accelerated" in parameters.id and "bf16" in parameters.id:
        pytest.skip("accelerated bf16 is compared with the truth in tests/test_acceleration.py")


@pytest.fixture
def build(finish):
    """The case's model in its dtype and in eval mode; every weight is loaded strictly."""

    def built(golden, kind=InternVL_G):
        model = kind(InternVLConfig(**golden.config)).to(golden.dtype)
        model.load_state_dict(golden.state, strict=True)
        return finish(model.eval())

    return built


@pytest.fixture
def vision_model(finish):
    def built(golden):
        model = InternVisionModel(InternVisionConfig(**golden.config["vision_config"]))
        model.to(golden.dtype).load_state_dict(golden.state, strict=True)
        return finish(model.eval())

    return built


@pytest.mark.parametrize(
    "case",
    ["vit_fp32", "vit_bf16", "vit_fp16", "vit_no_qknorm_qkvbias", "vit_dynamic_res_llava"],
)
def test_vision(case, vision_model):
    golden = load_golden(case)
    outputs = vision_model(golden)(golden.inputs["pixel_values"], output_hidden_states=True)
    expected = golden.listed("hidden_states")
    assert len(outputs.hidden_states) == len(expected) == 4
    for ours, theirs in zip(outputs.hidden_states, expected, strict=True):
        assert_golden(ours, theirs)
    assert_golden(outputs.last_hidden_state, golden.outputs["last_hidden_state"])
    assert_golden(outputs.pooler_output, golden.outputs["pooler_output"])


def test_vision_takes_an_embedded_sequence(vision_model):
    golden = load_golden("vit_pixel_embeds")
    outputs = vision_model(golden)(pixel_embeds=golden.inputs["pixel_embeds"])
    assert_golden(outputs.last_hidden_state, golden.outputs["last_hidden_state"])


def test_vision_resizes_its_position_table(finish):
    golden = load_golden("vit_resize_pos")
    model = InternVisionModel(InternVisionConfig(**golden.config["vision_config"])).eval()
    state = golden.state | {
        "embeddings.position_embedding": golden.inputs["position_embedding_before"]
    }
    model.load_state_dict(state, strict=True)
    finish(model)
    model.resize_pos_embeddings(28, 42, 7)
    table = model.embeddings.position_embedding
    assert_golden(table, golden.outputs["position_embedding_after"])
    outputs = model(golden.inputs["pixel_values"])
    assert_golden(outputs.last_hidden_state, golden.outputs["last_hidden_state"])


def test_pooler():
    golden = load_golden("pool_block")
    block = AttentionPoolingBlock(48, 4, qkv_bias=True, out_dim=24)
    block.load_state_dict(golden.state, strict=True)
    assert_golden(block(golden.inputs["x"]), golden.outputs["y"])


@pytest.mark.parametrize(
    "case",
    [
        "text_right_pad_fp32",
        "text_bf16",
        "text_fp16",
        "text_nopad_len80",
        "text_left_pad_quirk",
        "text_interior_unk_quirk",
    ],
)
@pytest.mark.filterwarnings("ignore:encode_text")
def test_text(case, build):
    golden = load_golden(case)
    model = build(golden)
    ids = golden.inputs["text"]
    assert_golden(model.get_text_features(ids, ids > 0), golden.outputs["text_features"])
    assert_golden(model.encode_text(ids), golden.outputs["text_embeds"])


def test_trimmed_text_is_the_padded_text(build):
    golden = load_golden("text_right_pad_fp32")
    model = build(golden)
    for ids, expected in zip(golden.inputs["text"], golden.outputs["text_embeds"], strict=True):
        assert_golden(model.encode_text(ids[ids > 0][None]), expected[None])


def test_image_C(build):
    golden = load_golden("encode_image_C")
    assert_golden(
        build(golden, InternVL_C).encode_image(golden.inputs["image"]),
        golden.outputs["image_embeds"],
    )


@pytest.mark.parametrize("letter", "CG")
def test_image_by_mode(letter, build):
    golden = load_golden(f"encode_image_mode_{letter}")
    model = build(golden, InternVLModel)
    embeds = model.encode_image(golden.inputs["image"], mode=f"InternVL-{letter}")
    assert_golden(embeds, golden.outputs["image_embeds"])


@pytest.mark.parametrize("suffix", ["", "_bf16", "_fp16", "_freq3", "_force_size"])
def test_image_G(suffix, build):
    golden = load_golden(f"encode_image_G{suffix}")
    model = build(golden)
    states = {}
    for name in (f"qllama.model.layers.{index}" for index in range(5)):
        model.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: states.update({name: output[0]})
        )
    image = golden.inputs["image"]
    backbone_embeds, query_embeds = model.get_image_features(image)
    assert_golden(backbone_embeds, golden.outputs["backbone_embeds"])
    assert_golden(query_embeds, golden.outputs["query_features"])
    for name, state in states.items():
        assert_golden(state, golden.outputs[f"hook.{name}"])
    for name in ("clip_projector", "clip_projector2"):
        source = backbone_embeds if name == "clip_projector" else query_embeds
        assert_golden(model.get_submodule(name)(source), golden.outputs[f"hook.{name}"])
    assert_golden(model.encode_image(image), golden.outputs["image_embeds"])


@pytest.mark.parametrize(
    "case, kind",
    [
        ("logits_C", InternVL_C),
        ("logits_C_bf16", InternVL_C),
        ("logits_G", InternVL_G),
        ("logits_mode_G", InternVLModel),
    ],
)
def test_logits(case, kind, build):
    golden = load_golden(case)
    mode = {"mode": "InternVL-G"} if kind is InternVLModel else {}
    logits = build(golden, kind)(golden.inputs["image"], golden.inputs["text"], **mode)
    assert_golden(logits[0], golden.outputs["logits_per_image"])
    assert_golden(logits[1], golden.outputs["logits_per_text"])


def test_features_without_text(finish):
    golden = load_golden("llava_forward")
    names = set(golden.state)
    model = InternVLModel(InternVLModel.config_class(**golden.config)).eval()
    missing, unexpected = model.load_state_dict(golden.state, strict=False)
    assert not unexpected and not names & set(missing)
    finish(model)
    vision_outputs, query_outputs = model(pixel_values=golden.inputs["pixel_values"])
    for ours, theirs in zip(
        vision_outputs.hidden_states, golden.listed("hidden_states"), strict=True
    ):
        assert_golden(ours, theirs)
    assert_golden(vision_outputs[0], golden.outputs["last_hidden_state"])
    assert_golden(query_outputs[0], golden.outputs["query_features"])


def test_prefill_cache_and_decoding(build):
    golden = load_golden("generate_prefill_logits")
    model = build(golden)
    ids, vision = golden.inputs["input_ids"], model.vision_model(golden.inputs["pixel_values"])
    decoder = model.qllama
    embeds = torch.cat(
        (model.query_tokens.expand(len(ids), -1, -1), decoder.get_input_embeddings()(ids)), 1
    )
    outputs = decoder(
        inputs_embeds=embeds,
        vision_hidden_states=vision.last_hidden_state,
        attention_mask=torch.ones(embeds.shape[:2]),
        use_zero_attention_mask=True,
        use_cache=True,
    )
    assert_golden(outputs.logits, golden.outputs["prefill_logits"])
    cache = outputs.past_key_values
    for index, layer in enumerate(cache.layers):
        assert_golden(layer.keys, golden.outputs[f"cache.{index}.k"])
        assert_golden(layer.values, golden.outputs[f"cache.{index}.v"])
    for step, column in enumerate(golden.inputs["continuation"].t()):
        outputs = decoder(input_ids=column[:, None], past_key_values=cache, use_cache=True)
        assert_golden(outputs.logits, golden.outputs[f"decode_logits.{step}"])


@pytest.mark.parametrize("case", GENERATE)
def test_generate(case, build):
    golden = load_golden(f"generate_{case}")
    model = build(golden)
    scores = golden.listed("scores")
    outputs = model.generate(
        **golden.inputs,
        **({"max_new_tokens": len(scores)} | GENERATE[case]),
        return_dict_in_generate=True,
        output_scores=True,
    )
    torch.testing.assert_close(outputs.sequences, golden.outputs["sequences"], rtol=0, atol=0)


def test_masks_of_the_training_pass():
    golden = load_file(GOLDEN / "stage2_mask.safetensors")
    padding = golden["in.attention_mask"]
    stage2 = stage2_mask(padding, 6, torch.float32)
    assert torch.equal(stage2 == 0, golden["out.stage2"])
    assert torch.equal(stage2.isinf(), golden["out.stage2_has_inf"])
    retrieval = stage2_mask(padding, 6, torch.float32, generation=False)
    assert torch.equal(retrieval == 0, golden["out.retrieval"])


@pytest.mark.parametrize("alpha", [None, 256])
def test_lora(alpha, finish):
    pytest.importorskip("peft")
    case = "lora_encode_G" if alpha is None else "lora_encode_G_llava_alpha256"
    golden = load_golden(case)
    config = golden.config | {"backbone_lora_alpha": alpha, "qllama_lora_alpha": alpha}
    model = InternVL_G(InternVL_G.config_class(**config)).eval()
    _, unexpected = model.load_state_dict(golden.state, strict=alpha is None)
    assert not unexpected
    finish(model)
    image = golden.inputs.get("image", golden.inputs.get("pixel_values"))
    backbone_embeds, query_embeds = model.get_image_features(image)
    expected = golden.outputs
    assert_golden(
        backbone_embeds, expected.get("backbone_embeds", expected.get("last_hidden_state"))
    )
    assert_golden(query_embeds, expected["query_features"])
    if alpha is None:
        assert_golden(model.encode_image(image), expected["image_embeds"])
