"""The decoding of captions: every form makes the same ids, as many as are counted."""

import torch
from benchmark_cases import measured

from internvl_engine.benchmarks import decode, model
from internvl_engine.generation import step


@torch.no_grad()
def test_captions_are_timed_in_every_form(device, monkeypatch):
    steps, advance = [], step.Rows.advance
    monkeypatch.setattr(step.Rows, "advance", lambda self, x: steps.append(1) or advance(self, x))
    forms = model.Forms(model.built("nano", torch.float32, device), ("int8",))
    cases = list(decode.cases(forms, (1, 2), new=4, tokens=17))
    assert [(c.operator, c.shape[0], c.tokens) for c in cases] == [
        ("decode", 1, 4), ("first_token", 1, 1), ("decode", 2, 8), ("first_token", 2, 2),
    ]  # fmt: skip
    providers = {"ours, float32", "ours, int8", "ours, generate", "eager"}
    for case in cases:
        assert set(case.providers) == providers
        found = {name: provider.run() for name, provider in case.providers.items()}
        assert torch.equal(found["ours, float32"], found["eager"])
        assert found["ours, int8"].shape == (case.shape[0], 1 + case.tokens // case.shape[0])
        again = case.providers["ours, float32"].run()  # from the same place in the cache
        assert torch.equal(again, found["eager"])
    assert len(steps) == 2 * 3 * 3  # batches, of which two wide runs and int8's take three steps
    assert not measured(*cases[:1]).failed
