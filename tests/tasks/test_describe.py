"""Captions and embeddings of one pass are those of several."""

import pytest
import torch
from tiny_engine import pictures, tiny_engine

from internvl_engine import InternVL
from internvl_engine.acceleration import accelerate
from internvl_engine.assets import held_out
from internvl_engine.configuration import InternVLConfig
from internvl_engine.generation import KVCache
from internvl_engine.modeling import InternVL_G

from golden_vectors import assert_golden, load_golden

PROMPTS = ["English caption:", "Question: What colour is it? Answer:", "a"]
OPTIONS = [{}, {"num_beams": 3}, {"stop": ["a"]}, {"min_new_tokens": 4, "repetition_penalty": 1.3}]


@pytest.fixture(params=["eager", "accelerated"])
def engine(request):
    return tiny_engine() if request.param == "eager" else InternVL.nano()


@pytest.fixture
def passes(engine, monkeypatch):
    """Images that go through the vision tower, and positions that go through the decoder."""
    counts = {"images": 0, "positions": 0}
    vision, embed = engine.model.vision_model.forward, engine.model.qllama.model._embed

    def count_vision(pixel_values, **options):
        counts["images"] += len(pixel_values)
        return vision(pixel_values=pixel_values, **options)

    def count_embed(ids, embeds):
        found = embed(ids, embeds)
        counts["positions"] += found.shape[0] * found.shape[1]
        return found

    monkeypatch.setattr(engine.model.vision_model, "forward", count_vision)
    monkeypatch.setattr(engine.model.qllama.model, "_embed", count_embed)
    return counts


@pytest.mark.parametrize("options", OPTIONS)
def test_descriptions_are_captions_and_embeddings(engine, options):
    images = pictures(5)
    both = engine.encode_image(images, "both")
    texts = engine.caption(images, max_new_tokens=6, **options)
    found = engine.describe(images, max_new_tokens=6, batch_size=2, **options)
    assert [each.text for each in found] == texts
    torch.testing.assert_close(torch.stack([x.c for x in found]), both.c, atol=2e-6, rtol=0)
    torch.testing.assert_close(torch.stack([x.g for x in found]), both.g, atol=2e-6, rtol=0)
    assert not found[0].c.is_inference() and found[0].g.dtype == torch.float32


def test_several_prompts_go_on_from_the_same_queries(engine, passes):
    images = pictures(4)
    expected = engine.caption(images, PROMPTS, max_new_tokens=4, batch_size=6)
    apart = dict(passes)
    passes.update(images=0, positions=0)
    found = engine.describe(images, PROMPTS, max_new_tokens=4, batch_size=6)
    assert [each.text for each in found] == expected
    assert passes["images"] == apart["images"] == 4
    queries = engine.model.config.num_query_token
    # the queries of every image once, in place of once a prompt
    saved = len(images) * (len(PROMPTS) - 1) * queries
    assert passes["positions"] <= apart["positions"] - saved


def test_nano_describes_what_it_never_saw():
    engine = InternVL.nano()
    images, _ = held_out()
    texts, both = engine.caption(images[:20]), engine.encode_image(images[:20], "both")
    found = engine.describe(images[:20])
    assert [each.text for each in found] == texts
    torch.testing.assert_close(torch.stack([x.g for x in found]), both.g, atol=2e-5, rtol=0)


def test_what_is_not_loaded_or_usable_is_said():
    engine = tiny_engine()
    partial = InternVL(engine.model, engine.processor, name="half", parts="g", accelerate=False)
    with pytest.raises(ValueError, match="half was loaded with parts='g'"):
        partial.describe(pictures(1))
    with pytest.raises(ValueError, match="describe: needs one text"):
        engine.describe(pictures(1), [])
    with pytest.raises(ValueError, match="image 2: "):
        engine.describe([*pictures(2), b"no image"])


GENERATE = {
    "greedy": {}, "greedy_batch": {}, "left_padded_batch": {}, "beam5": {"num_beams": 5},
    "beam3_batch": {"num_beams": 3}, "beam5_fp16": {"num_beams": 5},
    "repetition_ngram": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
}  # fmt: skip


def loaded(golden, accelerated):
    model = InternVL_G(InternVLConfig(**golden.config)).to(golden.dtype).eval()
    model.load_state_dict(golden.state, strict=True)
    if accelerated:
        accelerate(model, strict=True)
    return model


@pytest.mark.golden
@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("case", GENERATE)
@torch.no_grad()
def test_golden_captions_go_on_from_kept_queries(case, accelerated):
    golden = load_golden(f"generate_{case}")
    model, inputs = loaded(golden, accelerated), dict(golden.inputs)
    features, keys = model.read_images(inputs.pop("pixel_values"))
    new = len(golden.listed("scores"))
    queries, prompt = model.query_tokens.shape[1], inputs["input_ids"].shape[1]
    cache = KVCache(model.config.qllama_config, queries + prompt + new)
    for layer, (k, v) in keys.layers.items():
        cache.update(k, v, layer)
    found = model.generate(
        visual_features=features.backbone_embeds, past_key_values=cache, **inputs,
        **{"max_new_tokens": new} | GENERATE[case],
    )  # fmt: skip
    assert torch.equal(found, golden.outputs["sequences"])


@pytest.mark.golden
@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("case", ["encode_image_G", "encode_image_G_freq3", "encode_image_G_fp16"])
@torch.no_grad()
def test_golden_features_of_the_pass_that_keeps_queries(case, accelerated):
    golden = load_golden(case)
    model = loaded(golden, accelerated)
    features, _ = model.read_images(golden.inputs["image"])
    assert_golden(features.backbone_embeds, golden.outputs["backbone_embeds"])
    assert_golden(features.query_embeds, golden.outputs["query_features"])
    embeds = model.g_embedding(model.clip_projector(features[0]), features.query_embeds)
    assert_golden(embeds, golden.outputs["image_embeds"])
