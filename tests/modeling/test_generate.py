import pytest
import torch
from transformers import GenerationConfig, TextIteratorStreamer

from internvl_engine.generation import KVCache

from models import model, pixels

PROMPT = torch.tensor([[1, 9, 17, 5]])


@pytest.fixture(scope="module")
def built():
    torch.manual_seed(0)
    return model()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_without_a_length_it_makes_19_new_tokens_behind_a_bos(built):
    free = {"eos_token_id": None}
    ids = built.generate(pixels(1), PROMPT, **free)
    assert ids.shape == (1, 20) and ids[0, 0] == 1
    assert built.generate(pixels(1), PROMPT, max_length=5, **free).shape == (1, 5)
    config = GenerationConfig(max_new_tokens=3, eos_token_id=None, pad_token_id=0)
    assert built.generate(pixels(1), PROMPT, generation_config=config).shape == (1, 4)


def teacher_forced(built, image, prompt, new):
    """Greedy decoding without a cache: everything anew for every token."""
    ids = prompt
    for _ in range(new):
        embeds = torch.cat((built.query_tokens, built.qllama.model.embed_tokens(ids)), 1)
        vision = built.vision_model(image).last_hidden_state
        logits = built.qllama(
            inputs_embeds=embeds, vision_hidden_states=vision, use_zero_attention_mask=True
        ).logits
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
    return ids[:, prompt.shape[1] :]


@pytest.mark.parametrize("cached", [False, True])
def test_greedy_is_full_recomputation(built, cached):
    image = pixels(1)
    cache = {"past_key_values": KVCache(built.config.qllama_config, 8)} if cached else {}
    ids = built.generate(image, PROMPT, max_new_tokens=7, eos_token_id=None, **cache)
    assert torch.equal(ids[:, 1:], teacher_forced(built, image, PROMPT, 7))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("beams", [2, 5])
def test_beams_of_a_batch_are_those_of_one_image(built, beams, cached):
    images = pixels(3)
    prompts = torch.tensor([[1, 9, 17, 5], [0, 0, 1, 9], [0, 1, 8, 30]])
    mask = (prompts > 0).long()
    arguments = {"num_beams": beams, "max_new_tokens": 6, "eos_token_id": None}

    def cache():
        return {"past_key_values": KVCache(built.config.qllama_config, 8)} if cached else {}

    together = built.generate(images, prompts, mask, **arguments, **cache())
    for row, image in enumerate(images):
        prompt = prompts[row][prompts[row] > 0][None]
        alone = built.generate(image[None], prompt, **arguments, **cache())
        assert torch.equal(together[row], alone[0])


def test_right_padded_prompts_are_moved_to_the_left(built):
    images = pixels(2)
    right = torch.tensor([[1, 9, 17, 5], [1, 9, 0, 0]])
    left = torch.tensor([[1, 9, 17, 5], [0, 0, 1, 9]])
    arguments = {"max_new_tokens": 6, "eos_token_id": None}
    ours = built.generate(images, right, (right > 0).long(), **arguments)
    assert torch.equal(ours, built.generate(images, left, (left > 0).long(), **arguments))


def test_one_prompt_and_given_features_serve_every_image(built):
    images = pixels(3)
    features = built.vision_model(images).last_hidden_state
    ours = built.generate(input_ids=PROMPT, visual_features=features, max_new_tokens=4)
    assert torch.equal(ours, built.generate(images, PROMPT.expand(3, -1), max_new_tokens=4))


def test_sampling_follows_its_seed_and_returns_several(built):
    arguments = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 12}
    image = pixels(2)
    torch.manual_seed(3)
    first = built.generate(image, PROMPT, eos_token_id=None, **arguments)
    torch.manual_seed(3)
    assert torch.equal(built.generate(image, PROMPT, eos_token_id=None, **arguments), first)
    assert first.shape == (8, 13)
    assert len({tuple(row) for row in first[:4].tolist()}) > 1


def test_a_cache_that_holds_the_queries_is_continued(built):
    features = built.vision_model(pixels(2)).last_hidden_state
    expected = built.generate(input_ids=PROMPT, visual_features=features, max_new_tokens=5)
    for beams in (1, 3):
        cache = KVCache(built.config.qllama_config, 32)
        built.language_model.model(
            inputs_embeds=built.query_tokens.expand(2, -1, -1), vision_hidden_states=features,
            use_zero_attention_mask=True, past_key_values=cache, use_cache=True,
        )  # fmt: skip
        ours = built.generate(
            input_ids=PROMPT, visual_features=features, past_key_values=cache, max_new_tokens=5,
            num_beams=beams,
        )  # fmt: skip
        if beams == 1:
            assert torch.equal(ours, expected)
        else:
            fresh = built.generate(
                input_ids=PROMPT, visual_features=features, max_new_tokens=5, num_beams=beams
            )
            assert torch.equal(ours, fresh)


def test_it_streams_and_stops(built):
    class Pieces:
        def decode(self, ids, **_):
            ids = [ids] if isinstance(ids, int) else ids  # as transformers 5.24 asks, too
            return " ".join(str(int(i)) for i in ids) + "\n"

    streamer = TextIteratorStreamer(Pieces(), skip_prompt=True)
    image = pixels(1)
    ids = built.generate(image, PROMPT, max_new_tokens=5, eos_token_id=None, streamer=streamer)
    assert "".join(streamer).split() == [str(i) for i in ids[0, 1:].tolist()]
    stop = ids[0, 3].item()
    stopped = built.generate(image, PROMPT, max_new_tokens=5, eos_token_id=stop)
    first = ids[0].tolist().index(stop, 1)
    assert stopped[0].tolist() == ids[0, : first + 1].tolist()


def test_errors_say_what_came(built):
    with pytest.raises(ValueError, match="1 or 2 rows for 2 images, got 3"):
        built.generate(pixels(2), PROMPT.expand(3, -1))
    with pytest.raises(ValueError, match="give input_ids"):
        built.generate(pixels(2))
    with pytest.raises(ValueError, match="either pixel_values or visual_features"):
        built.generate(input_ids=PROMPT)
