"""Under autocast the static engine gives what transformers' own loops give under the same."""

import pytest
import torch
from foreign_decoders import IDS, llama
from tiny_chat import picture, tiny_chat

from internvl_engine import InternVL, accelerate
from internvl_engine.assets import held_out
from internvl_engine.generation import decode, step
from internvl_engine.generation.storage import StaticCache, Storage
from internvl_engine.tasks import caption, caption_queue, chat

PICTURE = picture()
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def steps(monkeypatch):
    taken, advance = [], step.Rows.advance
    monkeypatch.setattr(step.Rows, "advance", lambda s, ids: taken.append(1) or advance(s, ids))
    return taken


@pytest.fixture
def plain(monkeypatch):
    """Takes the engine away: transformers' own loops serve."""

    def without():
        for module in (caption, chat):
            monkeypatch.setattr(module, "static_generate", lambda run, **options: run(**options))
        monkeypatch.setattr(caption_queue, "admit", None)

    return without


@pytest.fixture(scope="module")
def trained():
    """Whose texts do not hang on the last bit."""
    return InternVL.nano(accelerate=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["eager", "accelerated", "int8"])
def test_captions(steps, plain, trained, how, dtype):
    engine = trained if how == "eager" else InternVL.nano(accelerate=False)
    if how != "eager":
        accelerate(engine.model, quantize="int8" if how == "int8" else None)
    pictures, found = held_out()[0][:3], []
    with torch.autocast("cpu", dtype):
        for beams in (1, 3):
            found += engine.caption(pictures, num_beams=beams)
        found += [each.text for each in engine.describe(pictures)]
        assert steps
        plain()
        expected = [trained.caption(pictures, num_beams=beams) for beams in (1, 3, 1)]
    assert found == sum(expected, []) and all(found)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("accelerated", [False, True])
def test_chats(steps, plain, accelerated, beams):
    asked, options = (PICTURE, "What is this?"), {"max_new_tokens": 4, "num_beams": beams}
    with torch.autocast("cpu", torch.bfloat16):
        found = tiny_chat(accelerate=accelerated).chat(*asked, **options)
        assert steps
        plain()
        assert tiny_chat().chat(*asked, **options) == found


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_language_models(steps, kind):
    built = llama(kind, heads=2)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = built.generate(IDS, **options, custom_generate=decode)
        assert len(steps) == 4
        assert torch.equal(found, built.generate(IDS, **options))


def test_a_storage_holds_what_is_of_another_dtype():
    """Under autocast keys that were rotated are wider than values."""
    storage = Storage(torch.zeros(1, 2, 1, 4), 1, 3, 8)
    layer = StaticCache(storage.tensor, torch.tensor([5, 0, 7])).layers[0]
    states = torch.randn(3, 2, 1, 4, generator=torch.Generator().manual_seed(0))
    keys, values = layer.update(states, states.bfloat16())
    assert keys.dtype == values.dtype == torch.float32
    for row, slot in enumerate((5, 0, 7)):
        assert torch.equal(keys[row, :, slot], states[row, :, 0])
        assert torch.equal(values[row, :, slot], states[row, :, 0].bfloat16().float())
    assert keys.count_nonzero() == states.numel()
