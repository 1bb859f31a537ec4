"""What is replaced or edited after `accelerate` is what computes."""

import copy

import pytest
import torch
from company import (
    PAIRS,
    assert_same_weights,
    close,
    eager,
    gradients,
    put,
    run,
)
from torch import nn

from internvl_engine import accelerate

pytestmark = pytest.mark.filterwarnings("ignore")


class Halved(nn.Module):
    """An activation or a norm of somebody else's, around the old one."""

    def __init__(self, old):
        super().__init__()
        self.old = old

    def forward(self, x):
        return self.old(x) * 0.5 + 0.1


class OtherNorm(nn.Module):
    """A norm without what RMSNorms have."""

    def __init__(self, old):
        super().__init__()
        self.gain = nn.Parameter(old.weight.detach() * 1.3)

    def forward(self, x):
        return nn.functional.layer_norm(x, x.shape[-1:]) * self.gain


def drop_in(old):
    """A norm that only computes something else."""

    class Loose(type(old)):
        def forward(self, x):
            return super().forward(x) + 0.2

    new = copy.deepcopy(old)
    new.__class__ = Loose
    return new


class Low(nn.Module):
    """A Linear of low rank beside the old one, as adapters put it there."""

    def __init__(self, old):
        super().__init__()
        self.old = old
        self.down = nn.Linear(old.in_features, 2, bias=False)
        self.up = nn.Linear(2, old.out_features, bias=False)

    def forward(self, x):
        return self.old(x) + self.up(self.down(x))


# Submodules of each kind, by what they are.
PARTS = {
    "ours": {
        "activation": "vision_model.encoder.layers.0.mlp.act",
        "silu": "qllama.model.layers.1.mlp.act_fn",
        "norm": "vision_model.encoder.layers.1.norm2",
        "first norm": "vision_model.encoder.layers.0.norm1",
        "next norm": "vision_model.encoder.layers.1.norm1",
        "qk norm": "vision_model.encoder.layers.0.attn.q_norm",
        "decoder norm": "qllama.model.layers.1.post_attention_layernorm",
        "cross norm": "qllama.model.layers.0.cross_attn.norm2",
        "last norm": "qllama.model.norm",
        "pool norm": "clip_projector.norm1_k",
        "attention": "vision_model.encoder.layers.1.attn",
        "mlp": "qllama.model.layers.0.mlp",
        "decoder layer": "qllama.model.layers.1",
        "layer": "vision_model.encoder.layers.0",
        "linear": "vision_model.encoder.layers.0.attn.qkv",
        "one of three": "qllama.model.layers.0.self_attn.k_proj",
        "pool linear": "clip_projector.cross_attn.k",
    },
    "chat": {
        "activation": "model.vision_tower.encoder.layer.0.mlp.activation_fn",
        "silu": "model.language_model.layers.0.mlp.act_fn",
        "norm": "model.vision_tower.encoder.layer.1.layernorm_after",
        "first norm": "model.vision_tower.encoder.layer.0.layernorm_before",
        "next norm": "model.vision_tower.encoder.layer.1.layernorm_before",
        "qk norm": "model.vision_tower.encoder.layer.0.attention.q_norm",
        "decoder norm": "model.language_model.layers.1.post_attention_layernorm",
        "last norm": "model.language_model.norm",
        "attention": "model.vision_tower.encoder.layer.1.attention",
        "mlp": "model.language_model.layers.0.mlp",
        "layer": "model.vision_tower.encoder.layer.0",
        "linear": "model.language_model.layers.0.mlp.down_proj",
        "one of three": "model.vision_tower.encoder.layer.0.attention.v_proj",
    },
    "published": {
        "activation": "vision_model.encoder.layers.0.mlp.act",
        "silu": "qllama.model.layers.1.mlp.act_fn",
        "norm": "vision_model.encoder.layers.1.norm2",
        "next norm": "vision_model.encoder.layers.1.norm1",
        "cross norm": "qllama.model.layers.0.cross_attn.norm1",
        "rotary": "qllama.model.layers.0.self_attn.rotary_emb",
        "mlp": "vision_model.encoder.layers.1.mlp",
        "linear": "vision_model.encoder.layers.0.attn.qkv",
        "one of three": "qllama.model.layers.0.self_attn.q_proj",
    },
}


class Passed(nn.Module):
    """Somebody's layer in place of another: it hands on what it is called with."""

    def __init__(self, old):
        super().__init__()
        self.old = old

    def forward(self, *args, **kwargs):
        output = self.old(*args, **kwargs)
        if isinstance(output, tuple):
            return (output[0] * 0.9, *output[1:])
        return output * 0.9

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("old"), name)


def change(built, kind, part):
    """Replaces a part, the same in every copy of the model."""
    torch.manual_seed(5)
    path = PARTS[kind][part]
    old = built.get_submodule(path)
    if part in ("activation", "silu"):
        new = Halved(old)
    elif part in ("next norm", "cross norm", "last norm"):
        new = drop_in(old)
    elif part == "qk norm":  # our eager attention reads its weight too
        new = copy.deepcopy(old)
        new.weight.data *= 1 + torch.rand(old.weight.shape)
    elif "norm" in part and part != "pool norm":
        new = OtherNorm(old)
    elif "linear" in part or part == "one of three":
        new = Low(old)
        if part == "pool linear":  # whose weight the block reads itself
            new = copy.deepcopy(old)
            new.weight = nn.Parameter(old.weight.detach() * 1.5)
    elif part == "rotary":
        new = copy.deepcopy(old)
        new.cos_cached.mul_(0.5)
    elif part == "pool norm":
        new = copy.deepcopy(old)
        new.eps = 0.5
    else:
        new = Passed(old)
    built.set_submodule(path, new)
    return new


CHANGES = [(kind, part) for kind in PARTS for part in PARTS[kind]]


@pytest.mark.parametrize("kind, part", CHANGES)
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_what_is_replaced_afterwards_is_what_computes(kind, part, mode):
    expected, built = eager(kind), eager(kind)
    plain = run(expected).detach()
    report = accelerate(built, mode)
    with torch.no_grad():
        run(built)
    for one in (expected, built):
        change(one, kind, part)
    wanted = run(expected).detach()
    assert (wanted - plain).norm() > 1e-4 * plain.norm()  # else it would not show
    for training in (False, True):
        close(run(built.train(training)).detach(), wanted)
    with torch.no_grad():
        close(run(built.eval()), wanted)
    report.undo()
    close(run(built).detach(), wanted)
    assert_same_weights(built, expected, rtol=0)


def _settings(built, kind):
    layers = built.model.language_model.layers
    layers[0].self_attn.scaling = 0.05
    built.model.vision_tower.encoder.layer[0].attention.scale = 0.02
    built.model.vision_tower.encoder.layer[1].layernorm_before.variance_epsilon = 0.3
    layers[1].mlp.act_fn = nn.GELU()


def test_settings_that_are_changed_afterwards_are_used(state):
    expected, built = eager("chat"), put(eager("chat"), state)
    for one in (expected, built):
        _settings(one, "chat")
    with torch.no_grad():
        close(run(built), run(expected))


def test_forwards_that_are_replaced_afterwards_are_called(state):
    outputs = []
    for one in (eager("chat"), put(eager("chat"), state)):
        vision, text = one.model.vision_tower.encoder.layer, one.model.language_model.layers
        for module in (vision[0].attention, vision[1], text[1].mlp, text[0].self_attn):
            old = module.forward

            def forward(*args, old=old, **kwargs):
                output = old(*args, **kwargs)
                if isinstance(output, tuple):
                    return (output[0] * 0.5, *output[1:])
                return output * 0.5

            module.forward = forward
        with torch.no_grad():
            outputs.append(run(one))
    close(*reversed(outputs))


@pytest.mark.parametrize("kind, state", PAIRS)
def test_weights_that_are_edited_in_place_are_what_computes(kind, state):
    """As initialisers, clipping, task arithmetic and weight tying by hand do it."""
    expected, built = eager(kind), put(eager(kind), state)
    for one in (expected, built):
        torch.manual_seed(6)
        for number, module in enumerate(m for m in one.modules() if isinstance(m, nn.Linear)):
            weight = module.weight
            if number % 5 == 0:
                nn.init.xavier_uniform_(weight)
            elif number % 5 == 1:
                with torch.no_grad():
                    weight[1:3].mul_(2)
                    weight[:, 0] = 0.25
            elif number % 5 == 2:
                weight.data += torch.randn(weight.shape) * 0.05
            elif number % 5 == 3:
                weight.data.clamp_(-0.1, 0.1)
            else:
                module.weight.data = weight.data.clone() * 0.5
    assert_same_weights(built, expected, rtol=1e-6)
    with torch.no_grad():
        close(run(built), run(expected))


@torch.no_grad()
def test_embeddings_heads_and_layers_are_taken_away_and_added(state):
    outputs = []
    for one in (eager("chat"), put(eager("chat"), state)):
        torch.manual_seed(7)
        one.resize_token_embeddings(64, mean_resizing=False)
        layers = one.model.language_model.layers
        del layers[1]
        one.config.text_config.num_hidden_layers = 1
        one.model.vision_tower.encoder.layer.insert(
            1, copy.deepcopy(one.model.vision_tower.encoder.layer[0])
        )
        torch.manual_seed(8)
        nn.init.normal_(one.get_input_embeddings().weight[61:], std=0.1)
        nn.init.normal_(one.lm_head.weight[61:], std=0.1)
        outputs.append(run(one))
    close(*reversed(outputs))


def test_what_is_accelerated_again_after_a_change_is_right():
    expected, built = eager("chat"), eager("chat")
    first = accelerate(built)
    for one in (expected, built):
        change(one, "chat", "norm")
        change(one, "chat", "one of three")
    second = accelerate(built)
    with torch.no_grad():
        close(run(built), run(expected))
    ours, theirs = gradients(built), gradients(expected)
    assert ours.keys() == theirs.keys()
    second.undo()
    first.undo()
    assert not [m for m in built.modules() if "internvl_engine" in type(m).__module__]
    with torch.no_grad():
        close(run(built), run(expected))


def test_default_dtype_and_device_do_not_matter():
    expected = run(eager("chat")).detach()
    built = eager("chat")
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            report = accelerate(built)
            state = built.state_dict()
            assert not any(t.is_meta or t.dtype != torch.float32 for t in state.values())
            built.train()
            built.eval()
            report.undo()
    finally:
        torch.set_default_dtype(torch.float32)
    close(run(built).detach(), expected)
