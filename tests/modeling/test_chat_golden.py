"""Chat models, eager and accelerated, against the published implementation's recorded outputs."""

import pytest
import torch

from internvl_engine.acceleration import MODES, accelerate

from chat_goldens import (
    CASES,
    assert_chat,
    assert_chat_16_bit,
    assert_same_answers,
    gradient,
    load_chat,
)

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module", params=CASES)
def golden(request):
    return load_chat(request.param)


@pytest.fixture(scope="module", params=["eager", *MODES])
def mode(request):
    return request.param


@pytest.fixture(scope="module")
def model(golden, mode):
    loaded = golden.model()
    if mode != "eager":
        accelerate(loaded, mode)
    return loaded


@pytest.fixture
def close(golden):
    return assert_chat if golden.dtype == torch.float32 else assert_chat_16_bit


@torch.no_grad()
def test_logits_loss_and_features(golden, model, close):
    outputs = model(golden.inputs["pixel_values"], **golden.forward_inputs())
    tokens = golden.inputs["attention_mask"].bool()
    assert outputs.logits.dtype == torch.float32
    close(outputs.logits[tokens], golden.outputs["logits"][tokens])
    close(outputs.loss[None], golden.outputs["loss"][None])
    features = model.extract_feature(golden.inputs["pixel_values"])
    close(features, golden.outputs["vit_embeds"])
    assert features.dtype == golden.dtype


@torch.no_grad()
def test_the_weighted_loss(golden, model):
    if "loss_weighted" not in golden.outputs:
        return
    outputs = model(
        golden.inputs["pixel_values"],
        **golden.forward_inputs(),
        loss_weight=golden.inputs["loss_weight"],
    )
    assert_chat(outputs.loss, golden.outputs["loss_weighted"])


def test_gradients(golden, model, mode):
    if mode == "inference":
        return
    recorded = {n: t for n, t in golden.outputs.items() if n.startswith("grad.")}
    if not recorded:
        return
    pixels = golden.inputs["pixel_values"].clone().requires_grad_()
    model.zero_grad()
    model(pixels, **golden.forward_inputs()).loss.backward()
    for name, expected in recorded.items():
        name = name.removeprefix("grad.")
        actual = pixels.grad if name == "pixel_values" else gradient(model, name)
        assert_chat(actual / expected.abs().max(), expected / expected.abs().max())
    if "image_flags" in golden.inputs:  # the tile of the row without an image
        unused = golden.inputs["image_flags"].flatten() == 0
        assert unused.any() == (golden.about["layout"] == "published")
        assert pixels.grad[unused].eq(0).all()


@pytest.mark.parametrize("kind, beams", [("greedy", 1), ("beam3", 3)])
def test_answers(golden, model, kind, beams):
    for name in golden.about["gens"]:
        answers = model.generate(
            **golden.prompts(name),
            max_new_tokens=golden.about["max_new_tokens"],
            num_beams=beams,
            do_sample=False,
        )
        expected = golden.outputs[f"gen.{name}.{kind}"]
        if golden.dtype == torch.float32:
            assert_same_answers(answers, expected, golden.about["eos_token_id"])
        else:  # ids that 16-bit rounding may exchange
            assert answers.shape == expected.shape and answers.dtype == expected.dtype
