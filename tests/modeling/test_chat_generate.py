"""`VisionLanguageModel.generate`: every way of transformers to decode, and new tokens only."""

import pytest
import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from chat_models import LLM, TOKENS, chat_model, ids, tiles

PROMPT = [3, "image", 4, 5, 4]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return chat_model()


@pytest.fixture
def inputs():
    input_ids, mask = ids(PROMPT)
    return {"pixel_values": tiles(1), "input_ids": input_ids, "attention_mask": mask}


def answer(model, inputs, **options):
    return model.generate(**inputs, **{"max_new_tokens": 8, "do_sample": False, **options})


def equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@torch.no_grad()
def greedy(model, inputs, count):
    """Token by token, without `generate` and without a cache."""
    embeds = model.embed(inputs["pixel_values"], inputs["input_ids"])
    answers = []
    for _ in range(count):
        token = model(inputs_embeds=embeds).logits[:, -1].argmax(-1)
        answers.append(token)
        embeds = torch.cat((embeds, model.get_input_embeddings()(token)[:, None]), dim=1)
    return torch.stack(answers, dim=1)


def test_greedy_answers_token_by_token(model, inputs):
    expected = greedy(model, inputs, 8)
    assert 2 not in expected  # no end among them
    equal(answer(model, inputs), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"prompt_lookup_num_tokens": 3, "return_dict_in_generate": True},
        {"return_dict_in_generate": True, "output_scores": True},
        {"generation_config": GenerationConfig(max_new_tokens=8, do_sample=False)},
        {"generation_config": GenerationConfig(prompt_lookup_num_tokens=2)},
    ],
    ids=lambda options: "-".join(options),
)
def test_other_ways_to_the_same_answer(model, inputs, options):
    result = answer(model, inputs, **options)
    equal(getattr(result, "sequences", result), answer(model, inputs))


@pytest.mark.parametrize("width", [16, 48])
def test_assistants(model, inputs, width):
    config = LlamaConfig(**{**LLM, "hidden_size": width, "num_hidden_layers": 1})
    expected = answer(model, inputs)
    equal(answer(model, inputs, assistant_model=LlamaForCausalLM(config).eval()), expected)
    equal(answer(model, inputs, assistant_model=model), expected)  # the text of another chat model


def test_phi3_keeps_its_cache_where_the_longer_rotary_factors_begin():
    """By ids its own preparation would read the prompt again, without the image."""
    factors = {"short_factor": [1.0] * 6, "long_factor": [3.0] * 6}
    phi3 = {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "rope_scaling": {"type": "su", **factors},
        "original_max_position_embeddings": 12,
    }
    model = chat_model(llm=phi3)
    for end in ([4, 5], list(range(40, 48))):  # they begin in the answer, and in the prompt
        inputs = {"pixel_values": tiles(1), "input_ids": ids([3, "image", *end])[0]}
        expected = answer(model, inputs)
        assert not set(expected[0].tolist()) & {3, *end, 60}  # nothing to look up: one by one
        equal(answer(model, inputs, prompt_lookup_num_tokens=2), expected)


@pytest.mark.skipif(
    transformers.__version__.startswith("4."),
    reason="transformers 4 cannot take back tokens behind a window",
)
def test_looking_up_with_a_window_that_is_shorter_than_the_prompt(inputs):
    model = chat_model(llm={"model_type": "mistral", "architectures": None, "sliding_window": 6})
    expected = answer(model, inputs)
    equal(answer(model, inputs, prompt_lookup_num_tokens=2), expected)


def test_features_in_place_of_tiles(model, inputs):
    expected = answer(model, inputs)
    features = model.extract_feature(inputs["pixel_values"])
    equal(answer(model, inputs, visual_features=features), expected)
    del inputs["pixel_values"]
    equal(answer(model, inputs, visual_features=features), expected)


def test_embeddings_in_place_of_ids(model, inputs):
    embeds = model.embed(inputs["pixel_values"], inputs["input_ids"])
    equal(answer(model, {"inputs_embeds": embeds}), answer(model, inputs))


def test_a_batch_of_text_with_a_tensor_of_no_tiles(model):
    input_ids, mask = ids([3, 4, 5], [6])
    inputs = {"pixel_values": tiles(0), "input_ids": input_ids, "attention_mask": mask}
    equal(answer(model, inputs), answer(model, inputs | {"pixel_values": None}))


def test_without_tiles_placeholders_are_tokens(model):
    input_ids, mask = ids(PROMPT)
    plain = model.language_model.generate(input_ids, attention_mask=mask, max_new_tokens=5)
    equal(model.generate(None, input_ids, mask, max_new_tokens=5), plain[:, input_ids.shape[1] :])


def test_a_batch_answers_as_its_rows_do_on_whatever_side_it_is_padded(model):
    rows = [["image", 3, 4, "image"], [5, 6, 7], [8, "image"]]
    pixels = tiles(3)
    alone = [
        answer(model, {"pixel_values": part, "input_ids": ids(row)[0]})
        for row, part in zip(rows, [pixels[:2], None, pixels[2:]], strict=True)
    ]
    input_ids, mask = ids(*rows)
    together = answer(model, {"pixel_values": pixels, "input_ids": input_ids,
                              "attention_mask": mask})  # fmt: skip
    equal(together, torch.cat(alone))
    flipped = [
        torch.stack(
            [torch.roll(row, -int((m == 0).sum())) for row, m in zip(side, mask, strict=True)]
        )
        for side in (input_ids, mask)
    ]
    right = {"pixel_values": pixels, "input_ids": flipped[0], "attention_mask": flipped[1]}
    equal(answer(model, right), together)
    unused = torch.cat((pixels[:2], tiles(1), pixels[2:]))
    flags = torch.tensor([1, 1, 0, 1])
    inputs = {"pixel_values": unused, "input_ids": input_ids, "attention_mask": mask}
    equal(answer(model, inputs, image_flags=flags), together)


def test_ends(model, inputs):
    whole = answer(model, inputs)[0].tolist()
    cut = whole.index(whole[3]) + 1
    assert answer(model, inputs, eos_token_id=[2, whole[3]])[0].tolist() == whole[:cut]
    model.language_model.generation_config.eos_token_id = whole[3]  # as llm_config has it
    assert answer(model, inputs)[0].tolist() == whole[:cut]
    model.language_model.generation_config.eos_token_id = 2

    def after_two(input_ids, scores, **_):
        return torch.full((1,), input_ids.shape[1] >= 2)

    assert answer(model, inputs, stopping_criteria=[after_two])[0].tolist() == whole[:2]


def test_beams_samples_and_several_sequences(model, inputs):
    assert answer(model, inputs, num_beams=3, num_return_sequences=2).shape[0] == 2
    sampled = answer(model, inputs, do_sample=True, top_k=5, num_return_sequences=3)
    assert sampled.shape[0] == 3 and sampled.shape[1] <= 8
    equal(answer(model, inputs, do_sample=True, top_k=1), answer(model, inputs))


@pytest.mark.parametrize(
    "llm",
    [
        {},
        {"max_position_embeddings": 4, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"model_type": "mistral", "architectures": None, "sliding_window": 6},
    ],
    ids=["plain", "dynamic", "window"],
)
def test_beams_read_the_prompt_once_and_answer_the_same(llm):
    model = chat_model(llm=llm)
    input_ids, mask = ids(PROMPT, [7, "image"])
    inputs = {"pixel_values": tiles(2), "input_ids": input_ids, "attention_mask": mask}
    embeds = model.embed(inputs["pixel_values"], input_ids)
    expected = answer(model, {"inputs_embeds": embeds, "attention_mask": mask}, num_beams=3)
    rows = []

    def read(_, arguments):
        rows.append(tuple(arguments[0].shape[:2]))

    model.language_model.model.layers[0].mlp.register_forward_pre_hook(read)
    equal(answer(model, inputs, num_beams=3), expected)
    length = input_ids.shape[1]
    if "sliding_window" in llm:
        assert rows[0] == (6, length)
    else:
        assert rows[:2] == [(2, length), (6, 1)]


class Streamer:
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_a_streamer_gets_the_new_tokens(model, inputs, options):
    streamer = Streamer()
    answers = answer(model, inputs, streamer=streamer, **options)
    assert streamer.tokens == answers[0].tolist() and streamer.ended


def test_a_conversation_goes_on_from_its_cache(model):
    pixels = tiles(2)
    first, _ = ids([3, "image", 4])
    result = answer(model, {"pixel_values": pixels[:1], "input_ids": first},
                    return_dict_in_generate=True)  # fmt: skip
    second = ids(["image", 7])[0]
    whole = torch.cat((first, result.sequences, second), dim=1)
    inputs = {"pixel_values": pixels, "input_ids": whole}
    expected = answer(model, inputs)
    equal(answer(model, inputs, past_key_values=result.past_key_values), expected)
    assert whole.shape[1] == first.shape[1] + 8 + TOKENS + 1
