"""Inputs that a chat model refuses: what was needed and what came, before anything is computed."""

import pytest
import torch

from chat_models import chat_model, ids, tiles


@pytest.fixture(scope="module")
def model():
    model = chat_model()

    def never(*_):
        raise AssertionError("the vision tower ran")

    model.vision_model.register_forward_pre_hook(never)
    model.language_model.model.register_forward_pre_hook(never)
    return model


@pytest.fixture(params=["forward", "generate"])
def call(request, model):
    return model if request.param == "forward" else model.generate


@pytest.mark.parametrize(
    "prompt, count, message",
    [
        ([3, "image", 4], 2, "4 placeholders \\(id 60\\), but 2 tiles of 4 tokens make 8"),
        ([3, "image", "image"], 1, "8 placeholders .* 1 tiles of 4 tokens make 4 features"),
        ([3, 4], 1, "0 placeholders .* make 4 features"),
        ([3, "image"], 0, "4 placeholders .* 0 tiles of 4 tokens make 0 features"),
        ([3, 60], 1, "1 placeholders"),  # published code broadcasts one feature
    ],
)
def test_counts_that_do_not_match(call, prompt, count, message):
    input_ids, mask = ids(prompt)
    with pytest.raises(ValueError, match=message):
        call(tiles(count), input_ids, mask)


def test_the_flags_count_too(model):
    input_ids, mask = ids([3, "image"])
    with pytest.raises(ValueError, match="4 placeholders .* 2 tiles"):
        model(tiles(3), input_ids, mask, image_flags=torch.tensor([1, 0, 1]))
    with pytest.raises(ValueError, match="4 placeholders .* 2 tiles"):
        model(tiles(3), input_ids, mask, image_flags=[1, 0, 1])
    with pytest.raises(ValueError, match="one flag for each of 3 tiles, got shape \\(2,\\)"):
        model(tiles(3), input_ids, mask, image_flags=torch.tensor([1, 0]))


@pytest.mark.parametrize(
    "shape",
    [(1, 3, 28, 56), (1, 3, 35, 35), (1, 3, 30, 30), (3, 28, 28), (1, 1, 28, 28), (1, 3, 0, 0),
     (1, 2, 3, 28, 28)],
    ids=str,
)  # fmt: skip
def test_tiles_of_a_wrong_shape(call, model, shape):
    input_ids, mask = ids([3, "image"])
    message = f"side a multiple of 14 .*got shape \\({', '.join(map(str, shape))}\\)"
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(shape), input_ids, mask)
    with pytest.raises(ValueError, match=message):
        model.extract_feature(torch.zeros(shape))


def test_tiles_that_nobody_normalised(call):
    input_ids, mask = ids([3, "image"])
    with pytest.raises(TypeError, match="floating-point values, got torch.uint8"):
        call(torch.zeros(1, 3, 28, 28, dtype=torch.uint8), input_ids, mask)


def test_a_placeholder_that_nobody_named(call, model):
    input_ids, mask = ids([3, "image"])
    model.img_context_token_id = None
    try:
        with pytest.raises(ValueError, match="set model.img_context_token_id to .*<IMG_CONTEXT>"):
            call(tiles(1), input_ids, mask)
        model.img_context_token_id = 64
        with pytest.raises(ValueError, match="is 64, but the language model has 64 embeddings"):
            call(tiles(1), input_ids, mask)
    finally:
        model.img_context_token_id = 60


def test_prompts_that_are_none(model):
    input_ids, mask = ids([3, "image"])
    with pytest.raises(ValueError, match="give input_ids or inputs_embeds"):
        model(tiles(1))
    with pytest.raises(ValueError, match="input_ids are needed"):
        model.generate(tiles(1))
    with pytest.raises(ValueError, match="inputs_embeds stand in place of input_ids and images"):
        model.generate(tiles(1), inputs_embeds=torch.zeros(1, 5, 48))
    with pytest.raises(ValueError, match="tiles need input_ids"):
        model(tiles(1), inputs_embeds=torch.zeros(1, 5, 48))
    with pytest.raises(ValueError, match="integers of shape \\(batch, tokens\\), got .*\\(5,\\)"):
        model.generate(tiles(1), input_ids[0])
    with pytest.raises(ValueError, match="got torch.float32"):
        model(tiles(1), input_ids.float())
    with pytest.raises(ValueError, match="of input_ids of shape \\(1, 5\\), got shape \\(1, 4, 48"):
        model(tiles(1), input_ids, inputs_embeds=torch.zeros(1, 4, 48))
    with pytest.raises(ValueError, match="shape of input_ids, \\(1, 5\\), got \\(1, 4\\)"):
        model.generate(tiles(1), input_ids, mask[:, 1:])
    with pytest.raises(ValueError, match="visual_features must be \\(tiles, tokens, 48\\)"):
        model.generate(None, input_ids, mask, visual_features=torch.zeros(4, 48))
    with pytest.raises(ValueError, match="labels need all logits"):
        model(None, input_ids, labels=input_ids, logits_to_keep=1)


def test_looking_up_after_an_image():
    with pytest.raises(ValueError, match="prompts that end with text"):
        chat_model().generate(tiles(1), ids([3, "image"])[0], prompt_lookup_num_tokens=2)
