"""What is changed, wrapped or watched after (and before) `accelerate` is seen."""

import copy

import pytest
import torch
from company import (
    KINDS,
    PAIRS,
    STATES,
    assert_same_weights,
    close,
    eager,
    gradients,
    inputs,
    put,
    run,
)
from torch import nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils.flop_counter import FlopCounterMode

from internvl_engine import accelerate

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=STATES)
def state(request):
    return request.param


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


def linears(built):
    return [name for name, m in built.named_modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("kind, state", PAIRS[:-1])  # the published pooler reads its weights
@torch.no_grad()
def test_quantize_dynamic_finds_every_linear(kind, state):
    from torch.ao.quantization import quantize_dynamic

    found = []
    for one in (eager(kind), put(eager(kind), state).eval()):
        quantized = quantize_dynamic(one, {nn.Linear}, torch.qint8)
        count = sum("quantized" in type(m).__module__ for m in quantized.modules())
        found.append((count, run(quantized)))
    assert found[0][0] == found[1][0] > 10
    assert (found[1][1] - found[0][1]).norm() <= 0.05 * found[0][1].norm()


class Scaled(torch.Tensor):
    """A weight in a form of its own, as torchao's are: int8 values and a scale, no storage."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, size, stride):
        return cls(inner["values"], inner["scale"])

    def dense(self):
        return self.values.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            new = cls(args[0].values, args[0].scale)
            return return_and_correct_aliasing(func, args, kwargs or {}, new)
        args = [x.dense() if isinstance(x, cls) else x for x in args]
        return func(*args, **(kwargs or {}))


def quantize(built, wanted=lambda name: True):
    """As torchao's `quantize_`: other weights in the same Linears."""
    for name, module in built.named_modules():
        if isinstance(module, nn.Linear) and wanted(name):
            weight = Scaled.of(module.weight.detach() + 0)
            module.weight = nn.Parameter(weight, requires_grad=False)
    return built


def torchao(built, wanted=lambda name: True):
    ao = pytest.importorskip("torchao.quantization")
    ao.quantize_(
        built,
        ao.Int8WeightOnlyConfig(),
        filter_fn=lambda m, name: isinstance(m, nn.Linear) and wanted(name),
    )
    return built


QUANTIZERS = {"a subclass": quantize, "torchao": torchao}


WEIGHTS = [(kind, torch.float32) for kind in KINDS] + [("chat", torch.bfloat16)]


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("kind, dtype", WEIGHTS)
@torch.no_grad()
def test_quantized_weights_are_multiplied_as_they_are(kind, quantizer, dtype):
    """Before `accelerate` and after it, all Linears and some; nobody reads their address."""
    for wanted in (lambda name: True, lambda name: "k_proj" in name or "fc2" in name):
        expected = QUANTIZERS[quantizer](eager(kind, dtype), wanted)
        weights = [type(m.weight) for m in expected.modules() if isinstance(m, nn.Linear)]
        first = QUANTIZERS[quantizer](eager(kind, dtype), wanted)
        reports = [accelerate(first)]
        second = eager(kind, dtype)
        reports.append(accelerate(second))
        run(second)
        QUANTIZERS[quantizer](second, wanted)
        for one, report in zip((first, second), reports, strict=True):
            close(run(one), run(expected))
            found = [type(m.weight) for m in one.modules() if isinstance(m, nn.Linear)]
            pairs = zip(found, weights, strict=True)
            assert all(t is w or w is nn.Parameter for t, w in pairs)  # or packed
            report.undo()
            close(run(one), run(expected))
            now = [type(m.weight) for m in one.modules() if isinstance(m, nn.Linear)]
            assert now == weights


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_report_says_which_weights_are_in_a_form_of_their_own(quantizer):
    report = accelerate(QUANTIZERS[quantizer](eager("chat")))
    text = str(report)
    name = {"a subclass": "Scaled", "torchao": "Int8Tensor"}[quantizer]
    assert name in text


@pytest.mark.parametrize("kind, state", PAIRS)
def test_flops_are_counted(kind, state):
    counts = []
    for one in (eager(kind), put(eager(kind), state).eval()):
        one.requires_grad_(False)  # or the counter looks for gradients of the query tokens
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run(one)
        counts.append(counter.get_total_flops())
    # Attention that is not PyTorch's is not among what the counter knows, and the pooler projects
    # one query instead of every token; the products are.
    assert 0.75 * counts[0] <= counts[1] <= counts[0] and counts[0] > 1e6


@pytest.mark.parametrize("register", ["forward", "forward_pre", "full_backward"])
@pytest.mark.parametrize("kind, state", PAIRS)
def test_global_hooks_see_every_module(kind, register, state):
    from torch.nn.modules import module as nn_module

    found = []
    for one in (eager(kind), put(eager(kind), state)):
        names, seen = {m: name for name, m in one.named_modules()}, set()
        where = {
            "forward": nn_module.register_module_forward_hook,
            "forward_pre": nn_module.register_module_forward_pre_hook,
            "full_backward": nn_module.register_module_full_backward_hook,
        }[register]
        handle = where(lambda module, *_, names=names, seen=seen: seen.add(names.get(module)))
        try:
            one.eval()
            run(one).square().mean().backward()
        finally:
            handle.remove()
        found.append(seen - {None})
    assert found[0] == found[1] and len(found[0]) > 20


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook",
                                      "register_full_backward_hook"])  # fmt: skip
@pytest.mark.parametrize("kind, state", PAIRS)
def test_hooks_on_every_module_see_what_they_did(kind, register, state):
    found = []
    for one in (eager(kind), put(eager(kind), state)):
        seen, handles = [], []
        for name, module in one.eval().named_modules():
            handles.append(
                getattr(module, register)(lambda *_, name=name, seen=seen: seen.append(name))
            )
        run(one).square().mean().backward()
        for handle in handles:
            handle.remove()
        found.append(sorted(seen))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind, state", PAIRS)
@torch.no_grad()
def test_a_hook_may_change_what_goes_through(kind, state):
    path = PARTS[kind]["one of three"]
    outputs = []
    for one in (eager(kind), put(eager(kind), state)):
        handle = one.get_submodule(path).register_forward_hook(lambda m, args, y: y * 0.5)
        outputs.append(run(one))
        handle.remove()
        outputs.append(run(one))
    close(outputs[2], outputs[0])
    close(outputs[3], outputs[1])
    assert (outputs[0] - outputs[1]).norm() > 1e-4 * outputs[1].norm()


@torch.no_grad()
def test_observers_of_operators_see_plain_tensors(state):
    """TorchDispatchMode and TorchFunctionMode, as profilers and loggers are made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    expected, built = run(eager("chat")), put(eager("chat"), state)
    names = []
    with Log():
        close(run(built), expected)
    assert len(names) > 20
    with torch.profiler.profile() as profile:
        run(built)
    assert len(profile.key_averages()) > 10


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


@pytest.mark.parametrize("kind, state", PAIRS)
@torch.no_grad()
def test_weights_can_be_read_as_tensors(kind, state):
    expected, built = eager(kind), put(eager(kind), state)
    theirs = dict(expected.named_parameters())
    before = run(built)
    for name, p in built.named_parameters():
        q = theirs[name]
        assert torch.equal(p.norm(), q.norm()) and torch.equal(p.float().sum(), q.float().sum())
        assert p.numel() == q.numel() and p.shape == q.shape and p.device == q.device
        assert p.stride() == q.stride() and p.is_contiguous() and not p.is_meta
        assert (p.detach().numpy() == q.detach().numpy()).all()
        assert torch.equal(p.flatten()[:7], q.flatten()[:7]) and p.ndim == q.ndim
        assert torch.equal(p.t() if p.ndim == 2 else p, q.t() if q.ndim == 2 else q)
        assert torch.equal(torch.stack((p, p)).mean(0), q) and p.tolist() == q.tolist()
        assert p.is_leaf and p.requires_grad == q.requires_grad and p.element_size() == 4
    assert torch.equal(run(built), before)  # reading changes nothing


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


@torch.no_grad()
def test_generation_attentions_and_states_of_the_composite(state):
    expected, built = eager("chat"), put(eager("chat"), state).eval()
    for one in (expected, built):
        one.set_attn_implementation("eager")
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    asked = {"output_attentions": True, "output_hidden_states": True, "return_dict_in_generate": 1}
    theirs, ours = (one.generate(**inputs(), **options, **asked) for one in (expected, built))
    assert torch.equal(ours.sequences, theirs.sequences)
    for name in ("attentions", "hidden_states"):
        for row, other in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            assert len(row) == len(other)
            for a, b in zip(row, other, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for beams in (1, 3):
        tokens = [one.generate(**inputs(), **options, num_beams=beams) for one in (expected, built)]
        assert torch.equal(*tokens)


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
