"""What `accelerate` takes for its own: nothing that computes something else, and it never fails."""

import copy
from functools import wraps
from types import FunctionType

import pytest
import torch
import torch.nn.functional as F
from foreign_decoders import published
from published_model import modeling_intern_vit, modeling_internvl
from torch import nn

from internvl_engine import accelerate
from internvl_engine.fused import FusedLlamaMLP, FusedVisionLayer
from internvl_engine.modeling.vision import InternAttention

from models import decoder, model, pixels


class MLP(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(64, 96, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(96, 64, bias=False), nn.SiLU()
        self.options = options

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Multiplied(MLP):  # as FalconH1MLP
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x) * 0.5) * self.up_proj(x))


class Clamped(MLP):  # as DeepseekV4MLP: only large activations show it
    def forward(self, x):
        gate, up = self.gate_proj(x).clamp(max=10), self.up_proj(x).clamp(-10, 10)
        return self.down_proj(self.act_fn(gate) * up)


class Normed(MLP):  # as BitNetMLP
    def __init__(self):
        super().__init__()
        self.ffn_sub_norm = modeling_intern_vit.InternRMSNorm(96)

    def forward(self, x):
        return self.down_proj(self.ffn_sub_norm(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class Dropping(MLP):
    def forward(self, x):
        inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(F.dropout(inner, 0.5, self.training))


class Raising(MLP):
    def forward(self, x):
        raise RuntimeError("not in this way")


class Gated(nn.Module):  # as Mamba's RMSNorm
    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(64)), 1e-6

    def forward(self, hidden_states, gate=None):
        hidden_states = hidden_states if gate is None else hidden_states * F.silu(gate)
        return F.rms_norm(hidden_states, (64,), self.weight, self.variance_epsilon)


class GatedRMSNorm(Gated):
    pass


class LooseRMSNorm(Gated):
    def forward(self, hidden_states):
        return F.rms_norm(hidden_states, (64,), self.weight, 1e-4)


class TimmBlock(nn.Module):  # and DINOv2's: the layer scales are modules
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(48), nn.LayerNorm(48)
        self.ls1, self.ls2 = nn.ModuleDict(), nn.ModuleDict()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(48, 144), "proj": nn.Linear(48, 48)})
        self.attn.num_heads = 3
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(48, 96), "fc2": nn.Linear(96, 48)})


LOOK_ALIKES = {
    Multiplied: "computes something else than FusedLlamaMLP",
    Clamped: "computes something else",
    Normed: "computes something else",
    Dropping: "computes something else",
    Raising: "could not be tried: RuntimeError: not in this way",
    GatedRMSNorm: "its forward takes other arguments than that of FusedRMSNorm",
    LooseRMSNorm: "computes something else than FusedRMSNorm",
}


@pytest.mark.parametrize("kind", LOOK_ALIKES)
def test_what_computes_something_else_is_kept(kind):
    built = nn.ModuleDict({"one": kind()})
    state = torch.get_rng_state()
    report = accelerate(built)
    assert LOOK_ALIKES[kind] in report.kept["one"]
    assert type(built["one"]) is kind
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="cannot be fused; one: "):
        accelerate(built, strict=True)


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_what_computes_the_same_is_fused_and_left_untouched_by_the_trial(mode):
    built = nn.ModuleDict({name: MLP() for name in ("one", "two")}).train(mode == "training")
    calls, x = [], torch.randn(2, 5, 64)
    expected = [each(x) for each in built.values()]
    for each in list(built.modules()):
        each.register_forward_hook(lambda *_: calls.append(1))
    weights = {key: (tensor, tensor.clone()) for key, tensor in built.named_parameters()}
    accelerate(built, mode, strict=True)
    assert all(isinstance(each, FusedLlamaMLP) for each in built.values())
    assert not calls and all(each.training is (mode == "training") for each in built.modules())
    assert all(built.get_parameter(key) is p for key, (p, _) in weights.items())
    assert all(torch.equal(p.detach() * 1, value) for p, value in weights.values())
    torch.testing.assert_close([each(x) for each in built.values()], expected)
    assert calls


@pytest.mark.parametrize("name, reason", [
    ("gemma.GemmaRMSNorm", "computes something else"),
    ("qwen3_next.Qwen3NextRMSNorm", "computes something else"),
    ("qwen3.Qwen3RMSNorm", None),
])  # fmt: skip
def test_norms_of_transformers_that_look_alike(name, reason):
    model, _, kind = name.partition(".")
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    norm = getattr(module, kind)(64)
    report = accelerate(nn.ModuleDict({"one": norm}))
    assert reason in report.kept["one"] if reason else report.replaced == ["one"]


def test_one_of_a_kind_is_tried(monkeypatch):
    tried = []
    forward = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x: tried.append(1) or forward(self, x))
    layers = nn.ModuleList(MLP() for _ in range(5))
    accelerate(layers, strict=True)
    assert len(tried) == 2  # in evaluation and in training
    layers = nn.ModuleList(Multiplied() if index else MLP() for index in range(3))
    assert list(accelerate(layers).kept) == ["1", "2"]


class DroppingModule(MLP):  # as GteMLP
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(self.dropout(inner))


def test_dropout_is_drawn_in_training_and_costs_nothing_in_evaluation():
    built = nn.ModuleDict({"one": DroppingModule()})
    fused, x = copy.deepcopy(built), torch.randn(2, 5, 64)
    accelerate(fused, strict=True)
    for mode in (True, False):
        outputs = []
        for one in (built, fused):
            torch.manual_seed(0)
            outputs.append(one.train(mode)["one"](x))
        torch.testing.assert_close(*outputs)


def halved(cls):
    return type(cls.__name__, (cls,), {"forward": lambda self, x: cls.forward(self, x.flip(1)) / 2})


@pytest.mark.parametrize(
    "build", [model, lambda: modeling_internvl.InternVLModel(decoder().config)]
)
@torch.no_grad()
def test_layers_with_another_attention_inside_are_kept(build):
    built, x = build().eval(), torch.randn(2, 17, 48)
    layers = next(m for m in built.modules() if type(m).__name__ == "InternVisionEncoder").layers
    original = type(layers[1].attn)
    layers[1].attn.__class__ = halved(original)
    states = [layer(x) for layer in layers]
    report = accelerate(built)
    kept = {name: reason for name, reason in report.kept.items() if "layers.1" in name}
    assert len(kept) == 1 and "computes something else" in str(kept)
    assert isinstance(layers[0], FusedVisionLayer)
    torch.testing.assert_close([layer(x) for layer in layers], states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["self_attn", "mlp", "cross_attn"])
@torch.no_grad()
def test_decoder_layers_with_another_part_are_kept(part):
    built = decoder()
    inputs = {"inputs_embeds": torch.randn(2, 9, 64), "vision_hidden_states": torch.randn(2, 5, 48)}
    cls = type(getattr(built.model.layers[0], part))

    class Other(cls):
        def forward(self, x, *args, **kwargs):
            return super().forward(x.flip(1), *args, **kwargs)

    for layer in (built.model.layers[0], built.model.layers[2]):
        getattr(layer, part).__class__ = Other
    expected = built(**inputs).logits
    report = accelerate(built)
    assert {"model.layers.0", "model.layers.2"} <= report.kept.keys()
    assert "model.layers.1" in report.replaced
    torch.testing.assert_close(built(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_published_attentions_with_another_order_are_kept():
    built = published()
    for attention in (built.model.layers[1].self_attn, built.model.layers[0].cross_attn):
        cls = type(attention)

        @wraps(cls.forward)  # the same arguments
        def backwards(self, hidden_states, *args, cls=cls, **kwargs):
            return cls.forward(self, hidden_states.flip(1), *args, **kwargs)

        attention.__class__ = type(cls.__name__, (cls,), {"forward": backwards})
    report = accelerate(built)
    assert {"model.layers.1.self_attn", "model.layers.0.cross_attn"} <= report.kept.keys()
    assert {"model.layers.0.self_attn", "model.layers.2.cross_attn"} <= set(report.replaced)


WRAPPERS = {
    "compiled": lambda layer: torch.compile(layer, backend="eager"),
    "checkpointed": lambda layer: checkpoint_wrapper(layer),
    "attributes": lambda layer: Passing(layer),
}


def checkpoint_wrapper(layer):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(layer)


class Passing(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        inner = super().__getattr__("inner")
        return inner if name == "inner" else getattr(inner, name)

    def forward(self, x):
        return self.inner(x) * 2


@pytest.mark.parametrize("how", WRAPPERS)
@torch.no_grad()
def test_wrappers_are_not_taken_for_the_layer(how):
    built, x = model(), pixels(2)
    layers = built.vision_model.encoder.layers
    for index, layer in enumerate(layers):
        layers[index] = WRAPPERS[how](layer)
    expected = built.encode_image(x)
    report = accelerate(built)
    inside = [name for name in report.replaced if "vision_model.encoder.layers" in name]
    assert len(inside) == 2
    assert not isinstance(layers[0], FusedVisionLayer)
    torch.testing.assert_close(built.encode_image(x), expected, rtol=1e-4, atol=1e-5)


def test_blocks_without_an_activation_are_kept():
    report = accelerate(nn.ModuleList([TimmBlock()]))
    assert report.kept == {"0": "its mlp.act is missing, not a GELU"}


@torch.no_grad()
def test_a_layer_in_several_places_is_fused_in_all():
    built, x = model(), pixels(2)
    layers = built.vision_model.encoder.layers
    shared = layers[1] = layers[0]
    whole = nn.ModuleDict({"first": shared, "model": built})
    expected = built.encode_image(x)
    inner = accelerate(built, strict=True)  # and what is fused already is, in the others
    report = accelerate(whole, strict=True)
    assert whole["first"] is layers[0] is layers[1] and isinstance(layers[0], FusedVisionLayer)
    names = ["first", *(f"model.vision_model.encoder.layers.{index}" for index in range(2))]
    assert set(names) <= set(report.replaced) and len(inner.replaced) == 11
    torch.testing.assert_close(built.encode_image(x), expected, rtol=1e-4, atol=1e-5)
    report.undo()
    inner.undo()
    assert whole["first"] is layers[0] is layers[1] is shared
    assert torch.equal(built.encode_image(x), expected)


def test_a_fused_layer_is_of_both_classes():
    built = model()
    eager = type(built.vision_model.encoder.layers[0])
    accelerate(built)
    first, second = built.vision_model.encoder.layers
    assert isinstance(first, eager) and isinstance(first, FusedVisionLayer)
    assert type(first) is type(second) and type(first).__name__ == eager.__name__
    assert type(copy.deepcopy(first)) is type(first)
    assert isinstance(first.attn, InternAttention)


def copied(kind):
    """The forward of a class as if it were written in a copy of the published file."""
    forward = FunctionType(kind.forward.__code__, globals())
    forward.__module__ = "copy.modeling_intern_vit"
    return forward


def test_check_tries_what_is_known_too():
    built = model()
    report = accelerate(built, check=True, strict=True)
    assert len(report.replaced) == 11
    place = {"__module__": "copy.modeling_intern_vit"}
    changed = type("InternRMSNorm", (LooseRMSNorm,), {"forward": copied(LooseRMSNorm)} | place)
    assert accelerate(nn.ModuleDict({"one": changed()})).replaced == ["one"]  # it is trusted
    kept = accelerate(nn.ModuleDict({"one": changed()}), check=True).kept
    assert "computes something else than FusedRMSNorm" in kept["one"]
