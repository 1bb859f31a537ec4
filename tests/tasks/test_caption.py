"""Captions and answers: batches, streams and several prompts give what one at a time gives."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_engine import pictures, tiny_engine

from internvl_engine.tasks.streaming import PieceStreamer, certain, cut

IMAGES = pictures(5)
TOKENS = {"max_new_tokens": 8}


@pytest.fixture
def engine():
    return tiny_engine()


@pytest.fixture
def seen(engine, monkeypatch):
    """How many images went through the vision tower."""
    counts = []
    vision = engine.model.vision_model.forward

    def count(pixel_values, **options):
        counts.append(len(pixel_values))
        return vision(pixel_values=pixel_values, **options)

    monkeypatch.setattr(engine.model.vision_model, "forward", count)
    return counts


def by_hand(engine, image, prompt="English caption:", **settings):
    ids, mask = engine.processor.tokenizer.encode_prompt(prompt)
    ids = engine.model.generate(
        engine.processor.image_processor(image), ids, mask, **(TOKENS | settings)
    )
    return engine.processor.decode(ids[0]).strip()


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_gives_what_each_image_gives(engine, seen, beams):
    texts = engine.caption(IMAGES, num_beams=beams, batch_size=2, **TOKENS)
    assert seen == [2, 2, 1]
    assert texts == [by_hand(engine, image, num_beams=beams) for image in IMAGES]
    assert len(set(texts)) > 1


def test_several_prompts_share_one_look(engine, seen):
    prompts = ["English caption:", "a much longer prompt of a red panda:", "x"]
    texts = engine.caption(IMAGES[:3], prompts, batch_size=2, **TOKENS)
    assert sum(seen) == 3
    assert texts == [[by_hand(engine, image, p) for p in prompts] for image in IMAGES[:3]]
    assert engine.caption(IMAGES[0], ["x"], **TOKENS) == [[texts[0][2]]]


def test_lengths_are_kept(engine):
    tokenizer = engine.processor.tokenizer
    short = engine.caption(IMAGES[:2], max_new_tokens=3)
    assert all(len(tokenizer.encode(text, bos=False)[0]) <= 3 for text in short)
    assert engine.caption([], **TOKENS) == []


def test_a_stop_text_ends_a_caption(engine):
    whole = engine.caption(IMAGES, max_new_tokens=12)
    letter = whole[0][2]
    stopped = engine.caption(IMAGES, max_new_tokens=12, stop=[letter, "never"])
    assert stopped == [text.split(letter)[0].strip() for text in whole]
    assert list(engine.caption(IMAGES[0], max_new_tokens=12, stop=[letter], stream=True)) != []
    assert (
        "".join(engine.caption(IMAGES[0], max_new_tokens=12, stop=[letter], stream=True))
        == (stopped[0])
    )


def test_a_stop_text_ends_the_work(engine, monkeypatch):
    steps = []
    decoder = engine.model.language_model.forward
    whole = engine.caption(IMAGES[0], max_new_tokens=12)[0]
    monkeypatch.setattr(
        engine.model.language_model, "forward", lambda **k: steps.append(1) or decoder(**k)
    )
    engine.caption(IMAGES[0], max_new_tokens=12, stop=[whole[0]])
    assert 1 <= len(steps) < 12


def test_a_stream_is_the_caption_in_pieces(engine):
    for image in IMAGES:
        pieces = list(engine.caption(image, stream=True, max_new_tokens=12))
        assert len(pieces) > 1
        assert "".join(pieces) == by_hand(engine, image, max_new_tokens=12)
    assert "".join(engine.caption([IMAGES[0]], "x", stream=True, **TOKENS)) == (
        by_hand(engine, IMAGES[0], "x")
    )


def test_leaving_a_stream_ends_the_generation(engine):
    pieces = engine.caption(IMAGES[0], stream=True, max_new_tokens=100)
    next(pieces)
    pieces.close()
    assert "generate" not in [thread.name for thread in threading.enumerate()]


def test_an_error_in_a_stream_reaches_its_reader(engine):
    with pytest.raises(ValueError, match="not a readable image"):
        list(engine.caption(b"no image", stream=True))


def test_answers_are_captions_of_the_question(engine):
    one, two = "What is it?", "Is it red?"
    prompt = {q: f"Question: {q} Answer:" for q in (one, two)}
    first = [by_hand(engine, IMAGES[0], prompt[q]) for q in (one, two)]
    second = [by_hand(engine, IMAGES[1], prompt[q]) for q in (one, two)]
    images = IMAGES[:2]
    assert engine.answer(images, one, **TOKENS) == [first[0], second[0]]
    assert engine.answer(images, [one, two], **TOKENS) == [first[0], second[1]]
    assert engine.answer(IMAGES[0], [one, two], **TOKENS) == first
    assert engine.answer(images, [[one, two], one], **TOKENS) == [first, second[0]]
    assert engine.answer(images, [[one, two], [one]], **TOKENS) == [first, second[:1]]
    assert "".join(engine.answer(IMAGES[0], one, stream=True, **TOKENS)) == first[0]


def test_one_after_another_as_they_come(engine, seen):
    sources = [IMAGES[0], b"no image", *IMAGES[1:]]
    outcomes = engine.caption_each(sources, batch_size=2, **TOKENS)
    first = next(outcomes)
    # Before the last are looked at: the row that was free took one of the second batch.
    assert seen == [1, 2] and first.value == by_hand(engine, IMAGES[0])
    found = [first, *outcomes]
    assert [outcome.number for outcome in found] == list(range(6))
    broken = found.pop(1)
    assert broken.value is None and "image 1: " in str(broken.error)
    assert [o.value for o in found] == [by_hand(engine, image) for image in IMAGES]
    prompts = ["English caption:", "x"]
    (one,) = engine.caption_each(IMAGES[0], prompts, **TOKENS)
    assert one.value == [by_hand(engine, IMAGES[0], p) for p in prompts] and one.error is None
    with pytest.raises(ValueError, match="max_new_tokens must be a whole number of 1 or more"):
        engine.caption_each(IMAGES[0], max_new_tokens=0)  # at once, before anything is read


def test_answers_about_one_buffer(engine):
    """An iterator's pictures are looked at one batch after another, and never kept as a list."""

    def one_buffer():
        for image in IMAGES[:3]:
            buffer[:] = np.resize(image, buffer.shape)
            yield buffer

    buffer = np.empty((30, 30, 3), np.uint8)
    questions = ["What is it?", "Is it red?", "x"]
    expected = engine.answer([image.copy() for image in one_buffer()], questions, **TOKENS)
    assert engine.answer(one_buffer(), questions, batch_size=1, **TOKENS) == expected
    for wrong in (questions[:2], [*questions, "y"]):
        with pytest.raises(ValueError, match="images came with"):
            engine.answer(one_buffer(), wrong, **TOKENS)


def test_prompts_in_every_form(engine):
    prompts = ["English caption:", "x"]
    expected = engine.caption(IMAGES[:1], prompts, **TOKENS)
    for form in (tuple(prompts), np.array(prompts), (prompt for prompt in prompts)):
        assert engine.caption(IMAGES[:1], form, **TOKENS) == expected


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda e: e.caption(IMAGES[0], ""), "none of them empty"),
        (lambda e: e.caption(IMAGES[0], []), "needs one text or several"),
        (lambda e: e.caption(IMAGES, stream=True), "exactly one image"),
        (lambda e: e.caption(IMAGES[0], ["a", "b"], stream=True), "only one prompt"),
        (lambda e: e.caption(IMAGES[0], stream=True, num_beams=2), "num_beams=1"),
        (lambda e: e.caption(IMAGES[0], max_new_tokens=0), "max_new_tokens must be a whole number"),
        (lambda e: e.caption(IMAGES[0], min_new_tokens=31), "min_new_tokens between 0"),
        (lambda e: e.caption(IMAGES[0], num_return_sequences=2), "num_return_sequences"),
        (lambda e: e.answer(IMAGES[:2], ["a", "b", "c"]), "2 images came with 3 questions"),
        (lambda e: e.answer(IMAGES[:2], ["a", "b"], stream=True), "only one image"),
        (lambda e: e.answer(IMAGES[0], "a", template="Q"), "'Q' has no {}"),
    ],
)
def test_what_can_not_be_described_is_said(engine, call, message):
    with pytest.raises(ValueError, match=message):
        call(engine)


@given(
    st.text("ab c\n猫é😀", max_size=20),
    st.lists(st.text("abc ", min_size=1, max_size=4), max_size=3),
)
def test_the_pieces_of_any_text_are_the_text(text, stop):
    """With every cut between two ids, those inside a character too."""
    tokenizer = tiny_engine().processor.tokenizer
    ids = tokenizer.encode(text, bos=True, eos=True)[0]
    pieces: list[str] = []
    streamer = PieceStreamer(tokenizer, stop, pieces.append)
    for i in ids:
        streamer.put(torch.tensor([i]))
    streamer.end()
    assert "".join(pieces) == cut(tokenizer.decode(ids), stop).strip()
    assert all(pieces)


def test_what_may_change_is_held_back():
    assert certain("a red", ["red panda"]) == "a"
    assert certain("a rat", ["red"]) == "a rat"
    assert certain("a \ufffd", []) == "a"
