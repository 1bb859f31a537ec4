"""Rotary embeddings of published language models, by their formulas."""

import math

import pytest
import torch

from chat_models import LLM, chat_model

DIM, BASE = 12, 100.0
STEPS = torch.arange(0, DIM, 2) / DIM


def tables(model, positions):
    """Cosine and sine (N, DIM), as the language model's attention gets them."""
    return [t[0] for t in model.language_model.model.rotary_emb(torch.zeros(1, 1, 48), positions)]


def check(actual, positions, frequencies, scale=1.0):
    angles = positions[0, :, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    for table, expected in zip(actual, (angles.cos(), angles.sin()), strict=True):
        torch.testing.assert_close(table, expected * scale, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("architecture", ["InternLM2ForCausalLM", "LlamaForCausalLM"])
@torch.no_grad()
def test_dynamic_bases_are_a_fresh_models_at_every_call(architecture):
    llm = {
        "architectures": [architecture],
        "max_position_embeddings": 16,
        "rope_scaling": {"type": "dynamic", "factor": 3.0},
        "rope_theta": BASE,
    }
    model = chat_model(llm=llm)
    short, long = torch.randint(3, 60, (1, 20)), torch.randint(3, 60, (1, 50))
    fresh = model(input_ids=short).logits
    model(input_ids=long)  # transformers' own would keep its table
    torch.testing.assert_close(model(input_ids=short).logits, fresh, rtol=0, atol=0)
    for length in (10, 16, 40):
        base = BASE
        if length > 16:
            base *= (3.0 * length / 16 - 2.0) ** (DIM / (DIM - 2))
        positions = torch.arange(length)[None]
        check(tables(model, positions), positions, 1 / base**STEPS)


@torch.no_grad()
def test_dynamic_bases_leave_short_prompts_alone():
    llm = {"max_position_embeddings": 16, "rope_theta": BASE}
    plain = chat_model(llm=llm)
    scaled = chat_model(llm=llm | {"rope_scaling": {"type": "dynamic", "factor": 3.0}})
    scaled.load_state_dict(plain.state_dict())
    ids = torch.randint(3, 60, (2, 16))
    expected = plain(input_ids=ids).logits
    torch.testing.assert_close(scaled(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["su", "longrope", "yarn"])
@pytest.mark.parametrize("longest, trained", [(64, 16), (16, 16)])
def test_phi3_factors(kind, longest, trained):
    short, long = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
    llm = {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "rope_scaling": {"type": kind, "short_factor": short, "long_factor": long},
        "rope_theta": BASE,
        "max_position_embeddings": longest,
        "original_max_position_embeddings": trained,
    }
    model = chat_model(llm=llm)
    stretch = longest / trained
    scale = 0.1 * math.log(stretch) + 1
    if kind != "yarn":
        scale = math.sqrt(1 + math.log(stretch) / math.log(trained))
    for last, factors in ((15, short), (16, long), (3, short)):  # the last position of the batch
        positions = torch.tensor([[0, 1, last]])
        check(tables(model, positions), positions, 1 / (torch.tensor(factors) * BASE**STEPS), scale)


@torch.no_grad()
def test_published_qwen2_is_plain():
    llm = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": BASE}
    model = chat_model(llm=LLM | llm | {"rope_scaling": {"type": "linear", "factor": 4.0}})
    positions = torch.arange(20)[None]
    check(tables(model, positions), positions, 1 / BASE**STEPS)


def test_padding_that_every_row_has_counts_for_no_base():
    llm = {
        "architectures": ["InternLM2ForCausalLM"],
        "max_position_embeddings": 16,
        "rope_scaling": {"type": "dynamic", "factor": 3.0},
        "rope_theta": BASE,
    }
    model = chat_model(llm=llm)
    prompt = torch.randint(3, 60, (1, 10))
    padded = torch.cat((torch.zeros(1, 10, dtype=torch.int64), prompt), dim=1)
    mask = (torch.arange(20) >= 10)[None].long()
    options = {"max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
    short = model.generate(input_ids=prompt, do_sample=False, **options)
    long = model.generate(input_ids=padded, attention_mask=mask, do_sample=False, **options)
    assert torch.equal(short.sequences, long.sequences)
    for ours, theirs in zip(short.logits, long.logits, strict=True):
        torch.testing.assert_close(ours, theirs)
