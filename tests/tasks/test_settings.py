"""Settings of captions: a configuration counts as arguments do, and what is wrong is said."""

import pytest
from tiny_engine import pictures, tiny_engine
from transformers import GenerationConfig

from internvl_engine.generation import step
from internvl_engine.tasks import caption_queue

IMAGES = pictures(2)
LENGTHS = {"max_new_tokens": 2, "num_beams": 3}


@pytest.fixture
def engine():
    return tiny_engine()


@pytest.mark.parametrize("form", [GenerationConfig, dict])
def test_a_generation_config_counts(engine, form):
    for ask in (engine.caption, lambda *a, **k: engine.answer(*a, "What is it?", **k)):
        expected = ask(IMAGES, **LENGTHS)
        assert ask(IMAGES, generation_config=form(**LENGTHS)) == expected != ask(IMAGES)
        longer = ask(IMAGES, generation_config=form(**LENGTHS), max_new_tokens=5)
        assert longer == ask(IMAGES, num_beams=3, max_new_tokens=5) != expected
    described = engine.describe(IMAGES, generation_config=form(**LENGTHS))
    assert [each.text for each in described] == engine.caption(IMAGES, **LENGTHS)
    with pytest.raises(ValueError, match="num_beams=1"):
        engine.caption(IMAGES[0], stream=True, generation_config=form(**LENGTHS))


def test_max_length_counts_the_bos(engine):
    expected = engine.caption(IMAGES, max_new_tokens=3)
    assert engine.caption(IMAGES, max_length=4) == expected != engine.caption(IMAGES)
    assert engine.caption(IMAGES, generation_config=GenerationConfig(max_length=4)) == expected
    assert engine.caption(IMAGES, generation_config={"max_length": 4}) == expected
    assert engine.caption(IMAGES, max_length=9, max_new_tokens=3) == expected


def test_none_is_what_is_usual(engine):
    nothing = dict.fromkeys(("num_beams", "max_new_tokens", "min_new_tokens", "generation_config"))
    assert engine.caption(IMAGES, **nothing) == engine.caption(
        IMAGES, num_beams=1, max_new_tokens=30, min_new_tokens=0
    )


@pytest.mark.parametrize("value", [1.5, "2", True, 0])
@pytest.mark.parametrize("name", ["num_beams", "max_new_tokens"])
def test_what_is_no_whole_number_is_said(engine, name, value):
    for task in (engine.caption, engine.caption_each, engine.describe):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of 1 or more, got"):
            task(IMAGES[0], **{name: value})


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"min_new_tokens": 1.5}, ValueError, "min_new_tokens must be a whole number of 0 or"),
        ({"max_length": "4"}, ValueError, "max_length must be a whole number of 2 or"),
        ({"generation_config": 3}, TypeError, "must be a GenerationConfig or a dict, got 3"),
        ({"generation_config": GenerationConfig(num_beams=2, num_return_sequences=2)}, ValueError,
         "num_return_sequences is not for texts"),
    ],
)  # fmt: skip
def test_what_else_is_refused(engine, options, kind, message):
    with pytest.raises(kind, match=message):
        engine.caption(IMAGES[0], **options)


@pytest.mark.parametrize("task", ["caption_each", "describe"])
def test_a_queue_keeps_the_prompts_that_go_on(engine, monkeypatch, task):
    """Not those that are done: images may come without end."""
    held, take = [], caption_queue.CaptionQueue._take
    monkeypatch.setattr(
        caption_queue.CaptionQueue, "_take",
        lambda self, *ended: held.append(len(self.read)) or take(self, *ended),
    )  # fmt: skip
    list(getattr(engine, task)(IMAGES * 6, batch_size=2, max_new_tokens=3))
    assert len(held) == 12 and max(held) <= 2


@pytest.mark.parametrize("stream", [False, True])
def test_room_is_made_as_it_is_needed(engine, monkeypatch, stream):
    """Not for every token that may come: most captions end long before."""
    slots, advance = [], step.Rows.advance

    def watched(self, ids):
        found = advance(self, ids)
        slots.append(self.storage.slots)
        return found

    monkeypatch.setattr(step.Rows, "advance", watched)
    asked = {"stream": stream, "eos_token_id": None}
    whole = "".join(engine.caption(IMAGES[0], max_new_tokens=200, **asked))
    assert slots[0] < 200 <= slots[-1] and len(slots) == 199
    end = {"max_new_tokens": 10**9, "stop": [whole[9]]}
    assert "".join(engine.caption(IMAGES[0], **asked, **end)) == whole[: whole.index(whole[9])]
