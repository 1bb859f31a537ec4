"""Continuous batching: every prompt gets what it gets alone, whoever sits beside it."""

from functools import partial

import pytest
import torch

from internvl_engine import accelerate
from internvl_engine.generation import admit, batching, continue_many, step

from models import model

IMAGES = torch.randn(9, 3, 28, 28, generator=torch.Generator().manual_seed(0))
LENGTHS = (4, 2, 7, 1, 3, 4, 6, 2, 5)
PROMPTS = [torch.randint(3, 61, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
OPTIONS = {"max_new_tokens": 12, "eos_token_id": [2, 14, 41, 46], "pad_token_id": 0}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=["eager", "accelerated"])
def built(request):
    torch.manual_seed(0)
    made = model()
    if request.param == "accelerated":
        accelerate(made)
    return made


class Queue:
    """Reads prompts in order, padded on the left, and remembers how many at a time."""

    def __init__(self, built, **options):
        self.run = partial(built.generate, **OPTIONS | options, custom_generate=admit)
        self.next, self.read = 0, []

    def __call__(self, count):
        numbers = range(len(PROMPTS))[self.next : self.next + count]
        if not numbers:
            return None
        self.next += len(numbers)
        self.read.append(len(numbers))
        longest = max(LENGTHS[n] for n in numbers)
        ids = torch.zeros(len(numbers), longest, dtype=torch.int64)
        for row, n in zip(ids, numbers, strict=True):
            row[longest - LENGTHS[n] :] = PROMPTS[n]
        return self.run(IMAGES[list(numbers)], ids, (ids > 0).long())


def alone(built, **options):
    """What each prompt becomes by itself, up to its end."""
    return [
        built.generate(image[None], prompt[None], **OPTIONS | options)[0].tolist()
        for image, prompt in zip(IMAGES, PROMPTS, strict=True)
    ]


@pytest.mark.parametrize("looks", [1, 5])
@pytest.mark.parametrize("seats", [1, 3, 20])
def test_every_prompt_gets_what_it_gets_alone(built, seats, looks, monkeypatch):
    monkeypatch.setattr(batching, "steps_per_look", lambda *_: looks)
    queue, steps, advance = Queue(built), [], step.Rows.advance
    monkeypatch.setattr(step.Rows, "advance", lambda self, x: steps.append(1) or advance(self, x))
    found = dict(continue_many(queue, seats))
    expected = alone(built)
    assert [found[n].tolist() for n in range(len(PROMPTS))] == expected
    assert len({len(ids) for ids in expected}) > 2
    assert max(queue.read) == min(seats, len(PROMPTS))
    if seats == 3 and looks == 1:
        assert len(queue.read) > len(PROMPTS) / 3  # some waited for nobody but the row that ended
        waiting = [max(len(ids) - 2 for ids in expected[at : at + 3]) for at in (0, 3, 6)]
        assert len(steps) < sum(waiting)  # what batches one after the other take


def test_rules_see_the_ids_of_their_own_prompt(built):
    rules = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2, "min_new_tokens": 5}
    found = dict(continue_many(Queue(built, **rules), 2))
    assert [found[n].tolist() for n in range(len(PROMPTS))] == alone(built, **rules)


def test_a_long_prompt_finds_room_beside_short_ones(built, monkeypatch):
    monkeypatch.setattr(step, "BLOCK", 2)
    found = dict(continue_many(Queue(built), 2))
    assert [found[n].tolist() for n in range(len(PROMPTS))] == alone(built)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"use_cache": False}, {"max_new_tokens": 1}])
def test_what_is_decoded_at_once_is_numbered_too(built, options):
    found = dict(continue_many(Queue(built, **options), 2))
    trimmed = [found[n].tolist()[: len(ids)] for n, ids in enumerate(alone(built, **options))]
    assert sorted(found) == list(range(len(PROMPTS)))
    assert trimmed == alone(built, **options)


def test_nothing_to_continue():
    assert list(continue_many(lambda count: None, 4)) == []
