"""The façade: embeddings are the model's, whatever the grouping; parts say what they lack."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engine import pictures, saved, tiny_engine

from internvl_engine import InternVL
from internvl_engine.checkpoint import PARTS
from internvl_engine.embedding.batches import image_batches
from internvl_engine.embedding.embedder import PROVIDES
from internvl_engine.embedding.texts import text_batches
from internvl_engine.processing import ImageError

ROUNDING = 2e-6  # float32 sums of another batch shape, on unit vectors of 48 values


@pytest.fixture
def engine() -> InternVL:
    return tiny_engine()


@pytest.fixture
def passes(engine, monkeypatch):
    """Counts the rows that go through the vision tower and the decoder."""
    counts = {"images": 0, "texts": 0, "longest": []}
    vision, text = engine.model.vision_model.forward, engine.model.encode_text

    def count_vision(pixel_values, **options):
        counts["images"] += len(pixel_values)
        return vision(pixel_values=pixel_values, **options)

    def count_text(ids, **options):
        counts["texts"] += len(ids)
        counts["longest"].append(ids.shape[1])
        return text(ids, **options)

    monkeypatch.setattr(engine.model.vision_model, "forward", count_vision)
    monkeypatch.setattr(engine.model, "encode_text", count_text)
    return counts


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


@torch.no_grad()
def published_text(engine, text):
    """One text as the published scripts embed it: padded to 80."""
    ids, mask = engine.processor.tokenizer.encode_for_embedding(text, 80, "max_length")
    return engine.model.encode_text(ids, attention_mask=mask)


@pytest.mark.parametrize("mode, name", [("c", "InternVL-C"), ("g", "InternVL-G")])
def test_images_are_embedded_as_the_model_does(engine, mode, name):
    images = pictures(5)
    with torch.no_grad():
        expected = engine.model.encode_image(engine.processor.image_processor(images), name)
    raw = engine.encode_image(images, mode, batch_size=2, normalize=False)
    torch.testing.assert_close(raw, expected, atol=ROUNDING, rtol=1e-5)
    torch.testing.assert_close(
        engine.encode_image(images, mode), unit(expected), atol=ROUNDING, rtol=0
    )


def test_both_is_c_and_g_from_one_vision_pass(engine, passes):
    images = pictures(5)
    both = engine.encode_image(images, "both", batch_size=2)
    assert passes["images"] == 5
    torch.testing.assert_close(both.c, engine.encode_image(images, "c"), atol=ROUNDING, rtol=0)
    torch.testing.assert_close(both.g, engine.encode_image(images, "g"), atol=ROUNDING, rtol=0)


def test_a_stream_is_read_no_further_than_it_must(engine):
    taken = []

    def endless():
        for index, image in enumerate(pictures(100)):
            taken.append(index)
            yield image

    batches = image_batches(engine.processor.image_processor, endless(), 4, torch.float32)
    assert next(batches).pixels.shape == (4, 3, 28, 28)
    assert len(taken) <= 8  # this batch and the one prepared ahead


def test_images_in_every_form(engine, tmp_path):
    from PIL import Image

    array = pictures(1)[0]
    Image.fromarray(array).save(tmp_path / "a.png")
    expected = engine.encode_image([array])
    forms = [
        array, Image.fromarray(array), tmp_path / "a.png", str(tmp_path / "a.png"),
        (tmp_path / "a.png").read_bytes(), torch.from_numpy(array).permute(2, 0, 1),
        iter([array]), array[None],
    ]  # fmt: skip
    for form in forms:
        assert torch.equal(engine.encode_image(form), expected)
    assert engine.encode_image([]).shape == (0, 48)
    assert engine.encode_image([], "both").g.shape == (0, 48)


def test_an_error_has_the_number_of_the_image(engine):
    images = [*pictures(5), b"no image", *pictures(3)]
    with pytest.raises(ImageError, match="image 5: .*not a readable image"):
        engine.encode_image(images, batch_size=2)


FUSED = 2e-5  # 7 layers of float32 products in another order, on unit vectors
TEXTS = ["a red panda", "two dogs", "a", "the quick brown fox jumps over the lazy dog " * 3, "猫"]


def test_texts_are_embedded_as_if_padded_to_80():
    engine = tiny_engine(dtype=torch.float64)
    expected = torch.cat([published_text(engine, text) for text in TEXTS])
    actual = engine.encode_text(TEXTS, normalize=False)
    # In float64 only the last rounding, to float32, is left.
    torch.testing.assert_close(actual, expected.float(), rtol=2.0**-23, atol=1e-12)
    torch.testing.assert_close(engine.encode_text(TEXTS[0]), unit(actual[:1]))


def test_each_text_is_run_once_and_kept_in_order(engine, passes):
    texts = [TEXTS[i] for i in (3, 0, 1, 0, 3, 2, 0)]
    actual = engine.encode_text(texts)
    assert passes["texts"] == 4
    single = torch.cat([engine.encode_text(text) for text in texts])
    torch.testing.assert_close(actual, single, atol=ROUNDING, rtol=0)
    assert torch.equal(actual[0], actual[4]) and torch.equal(actual[1], actual[6])


def test_short_texts_are_not_padded_to_long_ones(engine, passes):
    texts = [f"{word} {number}" for word in ("a", "cat") for number in range(6)] + [TEXTS[3]] * 2
    engine.encode_text(texts, max_tokens=100)
    assert len(passes["longest"]) > 1
    assert min(passes["longest"]) < 16 < max(passes["longest"]) <= 80


def test_an_unknown_piece_ends_no_text():
    """Id 0 is the unknown piece and the padding; only the mask tells them apart."""
    engine = tiny_engine()
    inner = [1, 30, 0, 40, 2]
    with torch.no_grad():
        expected = engine.model.encode_text(
            torch.tensor([inner]), attention_mask=torch.ones(1, 5, dtype=torch.long)
        )
    tokenizer = engine.processor.tokenizer
    with pytest.MonkeyPatch.context() as patch:
        rows = type("Rows", (), {"input_ids": [inner, [1, 50, 60, 70, 80, 90, 2]]})
        patch.setattr(tokenizer, "encode_for_embedding", lambda *a, **k: rows)
        actual = engine.encode_text(["x", "y"], normalize=False)
    torch.testing.assert_close(actual[:1], expected, atol=ROUNDING, rtol=1e-5)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 80), max_size=40), st.integers(1, 300))
def test_text_batches_hold_every_row_within_the_budget(lengths, budget):
    rows = [[7] * length for length in lengths]
    batches = list(text_batches(rows, budget))
    assert sorted(index for batch in batches for index in batch) == list(range(len(rows)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget


@settings(max_examples=4)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=5), st.integers(20, 200))
def test_any_texts_keep_their_place(texts, budget):
    engine = tiny_engine()
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    together = engine.encode_text(texts, max_tokens=budget)
    single = torch.cat([engine.encode_text(text) for text in texts])
    torch.testing.assert_close(together, single, atol=ROUNDING, rtol=0)


def test_logits_are_the_models(engine):
    images, texts = pictures(3), ["a red panda", "two dogs"]
    ids, _ = engine.processor.tokenizer.encode_for_embedding(texts)
    with torch.no_grad():
        expected, _ = engine.model(engine.processor.image_processor(images), ids, mode="InternVL-G")
    torch.testing.assert_close(engine.logits(images, texts, "g"), expected, atol=1e-4, rtol=1e-5)
    scale = float(engine.model.logit_scale.detach().exp())
    torch.testing.assert_close(engine.similarity(images, texts, "g") * scale, expected,
                               atol=1e-4, rtol=1e-5)  # fmt: skip


@pytest.mark.parametrize(
    "parts, call, needed",
    [
        ("text", lambda e: e.encode_image(pictures(1)), "'all' or 'c' or 'g' or 'image'"),
        ("c", lambda e: e.encode_image(pictures(1), "g"), "'all' or 'g'"),
        ("c", lambda e: e.encode_image(pictures(1), "both"), "'all' or 'g'"),
        ("image", lambda e: e.encode_text("a"), "'all' or 'c' or 'g' or 'text'"),
        ("g", lambda e: e.caption(pictures(1)), "'all' or 'caption'"),
        ("g", lambda e: e.caption(pictures(1), stream=True), "'all' or 'caption'"),
    ],
)
def test_what_is_not_loaded_is_said(engine, parts, call, needed):
    partial = InternVL(engine.model, engine.processor, name="half", parts=parts, accelerate=False)
    with pytest.raises(ValueError, match=f"half was loaded with parts='{parts}'.*parts={needed}"):
        call(partial)


def test_wrong_arguments_are_said(engine):
    with pytest.raises(ValueError, match='mode must be "c", "g" or "both", got \'x\''):
        engine.encode_image(pictures(1), "x")
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        engine.encode_image(pictures(1), batch_size=0)
    with pytest.raises(ValueError, match="parts must be one of all, c, g"):
        InternVL(engine.model, engine.processor, parts="most", accelerate=False)
    with pytest.raises(ValueError, match="no index yet"):
        InternVL(engine.model, engine.processor, accelerate=False).search("a")


def test_parts_are_those_of_the_checkpoint_reader():
    assert set(PROVIDES) == set(PARTS)


@pytest.mark.parametrize("parts", PARTS)
def test_each_part_loads_alone_and_accelerated(tmp_path_factory, parts):
    """Fused modules in place of eager ones, and only of what is there."""
    whole = tiny_engine()
    folder = saved(tmp_path_factory)
    engine = InternVL.from_pretrained(folder, parts=parts, dtype="float32", device="cpu")
    assert engine.parts == parts and engine.report.replaced and not engine.report.kept
    assert engine.num_parameters <= whole.num_parameters
    able, images = PROVIDES[parts], pictures(3)
    assert {"C embeddings of images", "embeddings of texts", "captions"} & able
    for mode in "cg":
        if f"{mode.upper()} embeddings of images" in able:
            actual, expected = (e.encode_image(images, mode) for e in (engine, whole))
            torch.testing.assert_close(actual, expected, atol=FUSED, rtol=0)
    if "embeddings of texts" in able:
        actual, expected = (e.encode_text(TEXTS) for e in (engine, whole))
        torch.testing.assert_close(actual, expected, atol=FUSED, rtol=0)
    if "captions" in able:
        actual, expected = (e.caption(images, max_new_tokens=5) for e in (engine, whole))
        assert actual == expected
    if parts != "caption":  # which embeds nothing: its poolers are not loaded
        assert set(engine.fingerprint) <= set(whole.fingerprint)
        assert all(whole.fingerprint[part] == hash for part, hash in engine.fingerprint.items())


def test_a_missing_checkpoint_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        InternVL.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no weights here"):
        InternVL.from_pretrained(tmp_path)


def test_progress_counts_images(engine):
    seen = []
    engine.encode_image(pictures(5), batch_size=2, progress=seen.append)
    assert seen == [2, 2, 1]


def test_a_generator_is_an_iterable_like_any_other(engine):
    images = pictures(5)
    streamed = engine.encode_image((image for image in images), batch_size=2)
    assert np.allclose(streamed, engine.encode_image(images), atol=ROUNDING)


def test_weights_that_do_not_fit_stay_mapped(monkeypatch):
    whole = InternVL.nano(dtype="bfloat16")
    monkeypatch.setattr("internvl_engine.engine.weights.memory", lambda: {"available": 100_000})
    with pytest.warns(UserWarning, match="0.0 GB of weights stay mapped .* only 0.0 GB of memory"):
        engine = InternVL.nano(dtype="bfloat16")
    # Fused, and with the weights of the file: none is packed or merged.
    assert engine.report.replaced == whole.report.replaced
    assert all(type(p) is torch.nn.Parameter for p in engine.model.parameters())
    hooked = [bool(layer._forward_hooks) for layer in engine.model.vision_model.encoder.layers]
    assert any(hooked)
    for mode in "cg":
        actual, expected = (e.encode_image(pictures(2), mode) for e in (engine, whole))
        torch.testing.assert_close(actual, expected, atol=0.02, rtol=0)  # of bfloat16
    captions = [each.caption(pictures(2), max_new_tokens=6) for each in (engine, whole)]
    assert captions[0] == captions[1]


def test_weights_that_are_in_memory_are_packed_whatever_is_left(monkeypatch):
    monkeypatch.setattr("internvl_engine.engine.weights.memory", lambda: {"available": 1000})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert InternVL.nano(dtype="float32").report.replaced
