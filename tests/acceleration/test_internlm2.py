"""`accelerate` on InternLM2 as the published remote code has it."""

import copy
from collections import Counter

import pytest
import torch
from foreign_decoders import IDS, LEFT, close
from published_model.modeling_internlm2 import InternLM2ForCausalLM

from internvl_engine import accelerate


def built(**changes):
    torch.manual_seed(0)
    model = InternLM2ForCausalLM(**changes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture(
    params=[{}, {"key_heads": 4, "bias": False}, {"scaling": "dynamic", "positions": 8}]
)
def pair(request):
    """An eager model and its accelerated copy."""
    eager = built(**request.param)
    fused = copy.deepcopy(eager)
    report = accelerate(fused, strict=True)
    kinds = Counter(entry.fused for entry in report.entries)
    assert kinds == {"FusedInternLM2Attention": 3, "FusedInternLM2MLP": 3, "FusedRMSNorm": 7}
    return eager, fused


@pytest.mark.parametrize("mask", [None, LEFT, LEFT.flip(1)])
@torch.no_grad()
def test_the_numbers_stay(pair, mask):
    expected, found = (model(IDS, mask)[0] for model in pair)
    real = torch.ones_like(IDS, dtype=torch.bool) if mask is None else mask.bool()
    close(found[real], expected[real])


@torch.no_grad()
def test_generation_is_the_same(pair):
    """With left padding, and past the length at which dynamic tables grow."""
    decoded = []
    for model in pair:
        ids, mask, past, tokens = IDS, LEFT, None, []
        for _ in range(8):
            logits, past, _ = model(ids, mask, past)
            ids = logits[:, -1:].argmax(-1)
            mask = torch.cat((mask, torch.ones(2, 1, dtype=mask.dtype)), 1)
            tokens.append(ids)
        decoded.append(torch.cat(tokens, 1))
        assert past[0][0].shape == (2, model.config.key_heads, 11 + 7, 16)
    assert torch.equal(*decoded)


@torch.no_grad()
def test_probabilities_are_still_there(pair):
    expected, found = (model(IDS, output_attentions=True)[2] for model in pair)
    close(found[-1], expected[-1])


@torch.no_grad()
def test_weights_exist_once_and_come_back(pair):
    eager, fused = pair
    state = eager.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in fused.state_dict().items())
    expected = eager(IDS)[0]
    again = accelerate(fused)  # says that it is fused
    assert all("already fused" in entry.reason for entry in again.entries)
    for module in list(fused.modules()):
        if hasattr(module, "restore"):
            module.restore()
    assert torch.equal(fused(IDS)[0], expected)


@pytest.mark.parametrize("mask", [None, LEFT])
def test_training_has_the_eager_gradients(mask):
    eager = built()
    fused, gradients = copy.deepcopy(eager), []
    accelerate(fused, "training")
    for model in (eager, fused):
        logits = model.train()(IDS, mask)[0]
        real = torch.ones_like(IDS, dtype=torch.bool) if mask is None else mask.bool()
        logits[real].square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*reversed(gradients), strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7


@torch.no_grad()
def test_positions_of_another_kind_are_kept():
    model = built()
    for layer in model.layers:
        layer.attention.config.rope_pos_id_version = "v2pe"
    report = accelerate(model)
    assert report.kept["layers.0.attention"] == "its positions are those of V2PE"
    assert len(report.replaced) == 3 + 7
