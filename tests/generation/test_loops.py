"""The loops against transformers' own: ends at different steps, rules of every kind, streams."""

import pytest
import torch
from foreign_decoders import IDS, LEFT, llama
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from internvl_engine import accelerate
from internvl_engine.generation import decode, generate, loops, step, support

ENDS = [3, 8, 15, 21, 22, 40, 41, 50]


@pytest.fixture(scope="module")
def built():
    torch.manual_seed(0)
    made = llama("Qwen2", heads=2)
    accelerate(made)
    return made


@pytest.fixture(params=[1, 8])
def looks(request, monkeypatch):
    """Looks for ends in every step, or in every eighth, as on a GPU."""
    monkeypatch.setattr(loops, "steps_per_look", lambda *_: request.param)
    monkeypatch.setattr("internvl_engine.generation.beams.steps_per_look", lambda *_: request.param)
    return request.param


class EndsAfter(StoppingCriteria):
    """Ends row b when it has its own number of ids, whatever they are."""

    def __init__(self, *lengths):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        lengths = self.lengths.repeat_interleave(len(input_ids) // len(self.lengths))
        return input_ids.shape[1] >= lengths


RULES = {
    "ends": {"eos_token_id": ENDS},
    "many ends": {"eos_token_id": list(range(0, 61, 3))},
    "one new id": {"stopping_criteria": [EndsAfter(12, 12)], "eos_token_id": 60},
    "no end": {"eos_token_id": None},
    "penalties": {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "bad_words_ids": [[7]]},
    "least": {"eos_token_id": ENDS, "min_new_tokens": 9},
    "forced": {"forced_eos_token_id": 5, "suppress_tokens": [4, 9], "eos_token_id": 5},
    "criteria": {"stopping_criteria": [EndsAfter(14, 19)], "eos_token_id": None},
    "both": {"stopping_criteria": [EndsAfter(18, 15)], "eos_token_id": ENDS},
}
WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 2.5, "top_p": 0.9, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "early beams": {"num_beams": 4, "early_stopping": True, "length_penalty": 0.3},
    "patient beams": {"num_beams": 2, "early_stopping": "never", "length_penalty": 2.0},
    "sampled beams": {"num_beams": 3, "do_sample": True, "temperature": 2.0},
}


def both(built, seed=1, **options):
    """What transformers' loop gives, and what the engine gives."""
    options = {"attention_mask": LEFT, "max_new_tokens": 21, "pad_token_id": 0, **options}
    torch.manual_seed(seed)
    expected = built.generate(IDS, **options)
    torch.manual_seed(seed)
    return expected, built.generate(IDS, **options, custom_generate=decode)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", RULES)
def test_ids_are_those_of_transformers(built, rule, way, looks):
    expected, found = both(built, **RULES[rule], **WAYS[way])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_rows_end_at_different_steps(built, looks):
    free, _ = both(built, eos_token_id=None)
    new = free[:, IDS.shape[1] :].tolist()
    ends = [new[0][4], new[1][11]]
    expected, found = both(built, eos_token_id=ends)
    assert torch.equal(found, expected)
    lengths = [min(row.index(end) for end in ends if end in row) + 1 for row in new]
    assert lengths[0] != lengths[1] and found.shape[1] == IDS.shape[1] + max(lengths)
    shorter = lengths.index(min(lengths))
    assert found[shorter, IDS.shape[1] + lengths[shorter] :].eq(0).all()


def test_ends_are_looked_at_every_few_steps(built, monkeypatch):
    """Steps are run ahead, and what they wrote behind the end is taken back."""
    monkeypatch.setattr(loops, "steps_per_look", lambda *_: 8)
    steps, advance = [], step.Rows.advance
    monkeypatch.setattr(step.Rows, "advance", lambda self, x: steps.append(1) or advance(self, x))
    expected, found = both(built, **RULES["one new id"])
    assert torch.equal(found, expected) and found.shape[1] == IDS.shape[1] + 1
    assert len(steps) == 7


class Listener(BaseStreamer):
    """Keeps what it is told."""

    def __init__(self):
        self.put_in, self.ended = [], False

    def put(self, value):
        self.put_in.append(value.tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("stop", [None, 16])
def test_a_streamer_hears_every_id(built, stop):
    heard = []
    for run in (generate, lambda run, **options: run(**options)):
        listener = Listener()
        criteria = {} if stop is None else {"stopping_criteria": [EndsAfter(stop)]}
        options = {"max_new_tokens": 9, "eos_token_id": None, "streamer": listener, **criteria}
        ids = run(built.generate, inputs=IDS[:1], do_sample=False, **options)
        assert listener.ended and ids.shape[1] == (IDS.shape[1] + 9 if stop is None else stop)
        heard.append(listener.put_in)
    assert heard[0] == heard[1] and len(heard[0]) == ids.shape[1] - IDS.shape[1] + 1


@pytest.mark.parametrize(
    "options",
    [
        {"return_dict_in_generate": True, "output_scores": True},
        {"prompt_lookup_num_tokens": 2},
        {"cache_implementation": "static", "disable_compile": True},
        {"use_cache": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_the_engine_does_not_serve_is_served_by_transformers(built, options, monkeypatch):
    monkeypatch.setattr(step.Rows, "advance", None)
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, **options}
    found, expected = generate(built.generate, inputs=IDS[:1], **settings), built.generate(
        IDS[:1], **settings
    )  # fmt: skip
    if "return_dict_in_generate" in options:
        assert len(found.scores) == 5
        found, expected = found.sequences, expected.sequences
    assert torch.equal(found, expected)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sharded_model_keeps_its_processes_together(built, processes, monkeypatch):
    group = torch.distributed
    monkeypatch.setattr(group, "is_initialized", lambda: True)
    monkeypatch.setattr(group, "get_world_size", lambda *_: processes)
    assert not support.goes_elsewhere(built, {})
    assert support.goes_elsewhere(built, {"synced_gpus": True})
    parameter = next(built.parameters())
    parameter.ds_id = 0  # as ZeRO's third stage marks what it shards
    try:
        assert support.goes_elsewhere(built, {}) == (processes > 1)
    finally:
        del parameter.ds_id


@pytest.mark.parametrize(
    "kind",
    [
        lambda: llama("Mistral", heads=2, sliding_window=5),
        lambda: llama(rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        lambda: llama("Qwen2", heads=2).train(),
        lambda: llama("Gemma", heads=2),
    ],
    ids=["window", "dynamic rotary", "training", "unknown"],
)
def test_models_that_cannot_be_static_go_to_transformers(kind, monkeypatch):
    monkeypatch.setattr(step.Rows, "advance", None)
    expected, found = both(kind(), max_new_tokens=6, eos_token_id=None)
    assert torch.equal(found, expected)
