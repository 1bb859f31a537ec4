"""The published code in its own environment: plain, and with flash-attn and apex installed."""

import copy
import importlib
import sys
from collections import Counter

import pytest
import torch
from company import close, eager, run, spread
from published_model import apex, modeling_intern_vit, modeling_internvl, modeling_qllama
from torch import nn

from internvl_engine import accelerate

from models import decoder, model, pixels

ENVIRONMENTS = {
    "plain": {},
    "flash": {"flash": True},
    "apex": {"norm": apex.FusedRMSNorm},
    "both": {"flash": True, "norm": apex.FusedRMSNorm},
}


def published(environment="plain", **fields):
    """The composite as it is built in an environment, with the weights of the plain one."""
    kinds = ENVIRONMENTS[environment]
    config = copy.deepcopy(decoder(**fields).config)
    config.norm_class = kinds.get("norm", modeling_qllama.LlamaRMSNorm)
    built = modeling_internvl.InternVLModel(config, layers=2, **kinds).eval()
    if not fields:
        built.load_state_dict(eager("published").state_dict())
    return built


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("environment", ENVIRONMENTS)
@torch.no_grad()
def test_everything_is_fused_in_every_environment(environment, mode):
    expected, built = run(eager("published")), published(environment)
    report = accelerate(built, mode, strict=True)
    assert not report.kept
    kinds = Counter(entry.kind for entry in report.entries)
    assert kinds["InternVisionEncoderLayer"] == 2 and kinds["LlamaCrossAttention"] == 2
    assert kinds["LlamaAttention"] == kinds["LlamaMLP"] == 3 and kinds["AttentionPoolingBlock"] == 1
    close(run(built), expected)  # which flash-attn itself would not compute here
    report.undo()
    if "flash" in environment or environment == "both":
        with pytest.raises(AssertionError):
            run(built)
    else:
        close(run(built), expected)
    assert not [m for m in built.modules() if "internvl_engine" in type(m).__module__]


@pytest.mark.parametrize("environment", ["flash", "apex"])
@torch.no_grad()
def test_bf16_is_as_exact_as_the_plain_one(environment):
    plain, built = eager("published", torch.bfloat16), published(environment).to(torch.bfloat16)
    x = torch.randn(4, 17, 48)
    truth = eager("published").double().vision_model(pixel_embeds=x.double()).last_hidden_state
    accelerate(built, strict=True)
    ours, theirs = (
        one.vision_model(pixel_embeds=x.bfloat16()).last_hidden_state.double()
        for one in (built, plain)
    )
    assert (ours - truth).norm() <= 1.25 * (theirs - truth).norm()


@torch.no_grad()
def test_another_epsilon_of_apex_is_seen():
    built = published("apex")
    for norm in (m for m in built.modules() if isinstance(m, apex.FusedRMSNorm)):
        norm.eps = 0.1
    expected, plain = run(built), run(eager("published"))
    accelerate(built, strict=True)
    close(run(built), expected)
    assert (expected - plain).norm() > 1e-2 * plain.norm()


@torch.no_grad()
def test_what_apex_leaves_out_is_kept():
    built = published("apex")
    norm = built.vision_model.encoder.layers[0].norm1
    norm.weight, norm.elementwise_affine = None, False
    report = accelerate(built)
    assert "vision_model.encoder.layers.0" in report.kept
    assert "vision_model.encoder.layers.1" in report.replaced


@torch.no_grad()
def test_attention_of_another_scale_is_kept():
    built = published("flash")
    built.vision_model.encoder.layers[1].attn.inner_attn.softmax_scale = 0.5
    report = accelerate(built)
    assert "vision_model.encoder.layers.1" in report.kept
    assert "vision_model.encoder.layers.0" in report.replaced


def with_positions(cls):
    """A cross-attention that takes what the published one does not."""

    def forward(self, hidden_states, vision_hidden_states, repeat_time=1, attention_mask=None,
                position_ids=None, past_key_value=None, output_attentions=False,
                use_cache=False):  # fmt: skip
        return cls.forward(self, hidden_states, vision_hidden_states, repeat_time, attention_mask,
                           past_key_value, output_attentions, use_cache)  # fmt: skip

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


@torch.no_grad()
def test_a_known_looking_module_is_always_in_the_report():
    built = published()
    attention = built.qllama.model.layers[0].cross_attn
    attention.__class__ = with_positions(type(attention))
    expected = run(built)
    with pytest.raises(ValueError, match="cross_attn"):
        accelerate(built, strict=True)
    report = accelerate(built)
    name = "qllama.model.layers.0.cross_attn"
    assert report.kept[name] and name in f"{report.kept}"
    assert "LlamaCrossAttention -> kept" in str(report)
    close(run(built), expected)


@pytest.mark.parametrize("name", ["LlamaCrossAttention", "LlamaAttention",
                                  "InternVisionEncoderLayer", "AttentionPoolingBlock",
                                  "InternRMSNorm", "LlamaMLP"])  # fmt: skip
def test_known_names_that_hold_something_else_are_in_the_report(name):
    class Other(nn.Module):
        def forward(self, x):
            return x

    Other.__name__ = name
    report = accelerate(nn.ModuleDict({"one": Other()}))
    assert list(report.kept) == ["one"] and f"{name} -> kept: " in str(report)
    with pytest.raises(ValueError, match="one: "):
        accelerate(nn.ModuleDict({"one": Other()}), strict=True)


def test_a_model_of_which_nothing_is_known_says_so():
    report = accelerate(nn.Sequential(nn.Linear(4, 4)))
    assert not report.entries and "no module of this model is known" in str(report)


@torch.no_grad()
def test_hidden_states_of_the_published_loops():
    built, x = eager("published"), torch.randn(2, 17, 48)
    fused = copy.deepcopy(built)
    accelerate(fused, strict=True)
    embeds = torch.randn(2, 6, 64)
    found = []
    for one in (built, fused):
        tower = one.vision_model(pixel_embeds=x, output_hidden_states=True).hidden_states
        mask = torch.zeros(2, 1, 6, 6)
        output = one.qllama.model.forward_train(
            inputs_embeds=embeds, vision_hidden_states=x, attention_mask=mask,
            output_hidden_states=True,
        )  # fmt: skip
        found.append((*tower, *output.hidden_states))
    assert len(found[0]) == len(found[1]) == 3 + 4
    for theirs, ours in zip(*found, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_layers_that_are_recomputed_train_alike(mode):
    expected, built = eager("published").train(), eager("published").train()
    accelerate(built, mode, strict=True)
    gradients = []
    for one in (expected, built):
        one.qllama.model.gradient_checkpointing = True
        run(one).square().mean().backward()
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        assert (gradients[1][name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6, name


@torch.no_grad()
def test_layers_return_what_was_asked_for():
    built = eager("published")
    fused = copy.deepcopy(built)
    accelerate(fused, strict=True)
    states, image = torch.randn(2, 7, 64), torch.randn(2, 17, 48)
    positions, mask = torch.arange(7)[None], torch.zeros(2, 1, 7, 7)
    for options in ({}, {"use_cache": True}, {"use_cache": True, "output_attentions": True}):
        theirs, ours = (
            one.qllama.model.layers[0](
                states, image, attention_mask=mask, position_ids=positions, **options
            )
            for one in (built, fused)
        )
        assert len(ours) == len(theirs) == 1 + len(options)
        close(ours[0], theirs[0])
        if options:
            torch.testing.assert_close(ours[1:], theirs[1:], rtol=1e-4, atol=1e-4)


def test_remote_code_is_found_by_the_name_of_its_file():
    """As transformers imports it: a module of another package with the file's name."""
    path = "transformers_modules.OpenGVLab.InternVL-14B-224px.0123abc.modeling_qllama"

    class LlamaCrossAttention(modeling_qllama.LlamaCrossAttention):
        pass

    LlamaCrossAttention.__module__ = path
    built = decoder()
    built.model.layers[0].cross_attn = LlamaCrossAttention(built.config)
    holder = nn.ModuleList([built.model.layers[0].cross_attn])
    assert accelerate(holder, strict=True).replaced == ["0"]
    assert path not in sys.modules


@torch.no_grad()
def test_weights_that_tell_apart_what_is_done():
    """The cases above would show a layer that is left out or called twice."""
    built = eager("published")
    plain = run(built)
    for layer in (built.vision_model.encoder.layers[1], built.qllama.model.layers[1]):
        state = copy.deepcopy(layer.state_dict())
        spread(layer)
        assert (run(built) - plain).norm() > 1e-2 * plain.norm()
        layer.load_state_dict(state)


def test_the_stand_ins_are_those_that_are_known():
    assert modeling_intern_vit.__name__.endswith(".modeling_intern_vit")
    assert apex.FusedRMSNorm.__module__.startswith("apex.")


def test_generation_says_which_transformers_it_needs(monkeypatch):
    """The published code asks for 4.37.2, whose caches are others; the rest of us runs there."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.37.2")
    with pytest.raises(ImportError, match=r"transformers>=4.57.* but found transformers==4.37.2"):
        model().generate(pixels(1), torch.tensor([[1, 9, 17, 5]]))
    for name in [name for name in sys.modules if name.startswith("internvl_engine.generation")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"transformers>=4.57.*\n?.*KVCache"):
        importlib.import_module("internvl_engine.generation")
