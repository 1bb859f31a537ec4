"""`accelerate` on models that are not ours."""

import copy
from collections import Counter

import pytest
import torch
from foreign_towers import vision_tower
from published_model import modeling_intern_vit, modeling_internvl
from torch import nn

from internvl_engine.acceleration import accelerate
from internvl_engine.fused import FusedModule

from models import decoder


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_the_published_code():
    model, x = modeling_internvl.InternVLModel(decoder().config).eval(), torch.randn(2, 17, 48)
    state = copy.deepcopy(model.state_dict())
    expected = model(x)
    report = accelerate(model, strict=True)
    kinds = Counter(entry.fused for entry in report.entries)
    assert kinds == {
        "FusedVisionEncoder": 1, "FusedVisionLayer": 3, "FusedAttentionPooling": 1,
        "FusedPublishedAttention": 3,
        "FusedCrossAttention": 2, "FusedLlamaMLP": 3, "FusedRMSNorm": 2 * 3 + 1,
    }  # fmt: skip
    for ours, theirs in zip(model(x), expected, strict=True):
        close(ours, theirs)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    report.undo()
    assert not any(isinstance(m, FusedModule) for m in model.modules())
    assert torch.equal(model(x)[1], expected[1])


@torch.no_grad()
def test_the_published_tower_of_300m():
    tower = modeling_intern_vit.InternVisionModel(3, 48, 3, 96, norm=nn.LayerNorm).eval()
    for name, parameter in tower.named_parameters():
        if "norm" in name:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    x = torch.randn(2, 17, 48)
    expected = tower(pixel_embeds=x, output_hidden_states=True)
    report = accelerate(tower, strict=True)
    kinds = Counter(entry.fused for entry in report.entries)
    assert kinds == {"FusedVisionEncoder": 1, "FusedVisionLayer": 3}
    found = tower(pixel_embeds=x, output_hidden_states=True)
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        close(ours, theirs)
    close(tower(pixel_embeds=x).pooler_output, expected.pooler_output)
    report.undo()
    assert torch.equal(tower(pixel_embeds=x).last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("qk_norm, bias", [(True, False), (False, True)])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
@torch.no_grad()
def test_transformers_vision_tower(qk_norm, bias, norm):
    model = vision_tower(use_qk_norm=qk_norm, attention_bias=bias, norm_type=norm)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    x = torch.randn(2, 3, 28, 28)
    expected = model(x).last_hidden_state
    state = copy.deepcopy(model.state_dict())
    report = accelerate(model, strict=True)
    assert [e.fused for e in report.entries] == ["FusedTransformersVisionLayer"] * 3
    close(model(x).last_hidden_state, expected)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    report.undo()
    assert torch.equal(model(x).last_hidden_state, expected)


@pytest.mark.parametrize("recompute", [False, True])
def test_transformers_vision_tower_trains(recompute):
    model = vision_tower()
    fused = copy.deepcopy(model)
    accelerate(fused, "training")
    x, gradients = torch.randn(2, 3, 28, 28), []
    for one in (model, fused):
        one.train()
        if recompute:
            one.gradient_checkpointing_enable()
        one(x).last_hidden_state.square().sum().backward()
        gradients.append([p.grad for p in one.parameters() if p.grad is not None])
    for ours, theirs in zip(*reversed(gradients), strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize("attentions", [False, True])
@torch.no_grad()
def test_transformers_vision_tower_tells_its_states(attentions):
    model = vision_tower()
    if attentions:  # only this implementation has them, and transformers refuses to ask others
        model.set_attn_implementation("eager")
    fused, x = copy.deepcopy(model), torch.randn(2, 3, 28, 28)
    accelerate(fused)
    for config in (model.config, fused.config):
        config.output_hidden_states, config.output_attentions = True, attentions
    for _ in range(2):  # transformers installs its recorders the first time
        expected, found = model(x), fused(x)
        assert len(found.hidden_states) == 3 + 1
        for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
            close(ours, theirs)
        if attentions:
            assert len(found.attentions) == 3
            for ours, theirs in zip(found.attentions, expected.attentions, strict=True):
                close(ours, theirs)
