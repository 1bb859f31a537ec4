"""Captions, answers and chats are decoded by the static engine, and say what `generate` says."""

import pytest
from tiny_chat import picture, tiny_chat
from tiny_engine import pictures, tiny_engine

from internvl_engine.generation import step
from internvl_engine.tasks import caption, caption_queue, chat

IMAGES = pictures(3)


@pytest.fixture
def steps(monkeypatch):
    """The rows of every step of the engine."""
    taken, advance = [], step.Rows.advance
    monkeypatch.setattr(
        step.Rows, "advance", lambda self, ids: taken.append(len(ids)) or advance(self, ids)
    )
    return taken


@pytest.fixture
def plain(monkeypatch):
    """Takes the engine away: transformers' own loops serve."""

    def without():
        for module in (caption, chat):
            monkeypatch.setattr(module, "static_generate", lambda run, **options: run(**options))
        monkeypatch.setattr(caption_queue, "admit", None)

    return without


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"stop": "a"}, {"do_sample": True}])
def test_captions(steps, plain, options):
    engine, options = tiny_engine(), {"max_new_tokens": 9, **options}
    if "do_sample" in options:
        options |= {"top_k": 1}
    found = engine.caption(IMAGES, batch_size=2, **options)
    assert steps and set(steps) <= {2, 2 * options.get("num_beams", 1), options.get("num_beams", 1)}
    taken = len(steps)
    plain()
    assert engine.caption(IMAGES, batch_size=2, **options) == found and len(steps) == taken


def test_a_streamed_caption(steps, plain):
    engine = tiny_engine()
    pieces = list(engine.caption(IMAGES[0], stream=True, max_new_tokens=9, eos_token_id=None))
    assert steps == [1] * 8
    plain()
    again = list(engine.caption(IMAGES[0], stream=True, max_new_tokens=9, eos_token_id=None))
    assert again == pieces and len(steps) == 8


@pytest.mark.parametrize("accelerate", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"repetition_penalty": 1.5}])
def test_chats(steps, plain, accelerate, options):
    talk = tiny_chat(accelerate=accelerate)
    asked = [picture(), picture(30, 30, 1)], ["What is this?", "And the colour of it?"]
    found = talk.chat(*asked, max_new_tokens=7, **options)
    assert set(steps) == {2 * options.get("num_beams", 1)}
    streamed = "".join(talk.chat(asked[0][0], asked[1][0], stream=True, max_new_tokens=7))
    taken = len(steps)
    plain()
    assert talk.chat(*asked, max_new_tokens=7, **options) == found
    again = talk.chat(asked[0][0], asked[1][0], stream=True, max_new_tokens=7)
    assert "".join(again) == streamed and len(steps) == taken
