"""The static engine against the published implementation's recorded generations."""

import pytest
import torch

from internvl_engine import InternVL_G, InternVLConfig, accelerate
from internvl_engine.generation import KVCache, decode, step

from chat_goldens import CASES, assert_same_answers, load_chat
from golden_vectors import GENERATE, load_golden

pytestmark = pytest.mark.golden
OURS_ONLY = {"internlm2_300m_dynamic", "phi3_300m_su_long"}  # rotary angles that follow the length


@pytest.fixture
def steps(monkeypatch):
    """Counts the steps of the engine."""
    taken, advance = [], step.Rows.advance

    def counted(self, ids):
        taken.append(len(ids))
        return advance(self, ids)

    monkeypatch.setattr(step.Rows, "advance", counted)
    return taken


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("case", GENERATE)
def test_captions(case, accelerated, steps):
    golden = load_golden(f"generate_{case}")
    model = InternVL_G(InternVLConfig(**golden.config)).to(golden.dtype).eval()
    model.load_state_dict(golden.state, strict=True)
    if accelerated:
        accelerate(model, strict=True)
    new = {"max_new_tokens": len(golden.listed("scores"))} | GENERATE[case]
    expected = golden.outputs["sequences"]
    for cache in ({}, {"past_key_values": KVCache(model.config.qllama_config, 8)}):
        ids = model.generate(**golden.inputs, **new, **cache, custom_generate=decode)
        torch.testing.assert_close(ids, expected, rtol=0, atol=0)
    rows = golden.inputs["input_ids"].shape[0] * new.get("num_beams", 1)
    assert steps == [rows] * len(steps) and len(steps) >= 2 * (expected.shape[1] - 2)


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_answers(case, accelerated, steps):
    golden = load_chat(case)
    model = golden.model()
    if accelerated:
        accelerate(model)
    for name in golden.about["gens"]:
        for kind, beams in (("greedy", 1), ("beam3", 3)):
            options = {"max_new_tokens": golden.about["max_new_tokens"], "num_beams": beams,
                       "do_sample": False}  # fmt: skip
            answers = model.generate(**golden.prompts(name), **options, custom_generate=decode)
            expected = golden.outputs[f"gen.{name}.{kind}"]
            if golden.dtype == torch.float32:
                assert_same_answers(answers, expected, golden.about["eos_token_id"])
            else:  # ids that 16-bit rounding may exchange
                assert answers.shape == expected.shape and answers.dtype == expected.dtype
    assert bool(steps) == (case not in OURS_ONLY)
