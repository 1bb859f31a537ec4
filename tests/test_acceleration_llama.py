"""`accelerate` on decoders that are not ours: the published QLLaMA, transformers' LLaMA and kin."""

import copy
import re
from collections import Counter
from functools import partial

import pytest
import torch
from foreign_decoders import llama, published
from torch import nn
from weights import weight_bytes

from internvl_engine import accelerate, kernels
from internvl_engine.fused import FusedLlamaAttention
from internvl_engine.generation import KVCache

DECODERS = {
    "published": published,
    "llama": llama,
    "grouped": partial(llama, heads=2),
    "qwen2": partial(llama, "Qwen2", heads=2),
    "mistral": partial(llama, "Mistral", heads=2, sliding_window=5),
}
IDS = torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(0))
LEFT = torch.tensor([[1] * 11, [0] * 4 + [1] * 7])  # 1 for a token, 0 for padding


@pytest.fixture(params=DECODERS)
def name(request):
    return request.param


@pytest.fixture
def built(name):
    return DECODERS[name]()


def states(built, mask=None):
    """What the decoder makes of IDS, where a token is; the published one reads an image beside."""
    inputs = {"input_ids": IDS, "attention_mask": mask}
    if not hasattr(built, "config"):
        image = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(1))
        inputs |= {"vision_hidden_states": image.to(built.lm_head.weight.dtype)}
        inputs |= {"use_zero_attention_mask": mask is None}
    logits = built(**inputs).logits
    return logits if mask is None else logits[mask.bool()]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_everything_is_replaced_and_the_numbers_stay(name, built):
    masks = (None, LEFT, LEFT.flip(1))
    expected = [states(built, mask) for mask in masks]
    report = accelerate(built, strict=True)
    kinds = Counter(entry.fused for entry in report.entries)
    attention = {"FusedPublishedAttention": 3, "FusedCrossAttention": 2}
    if name != "published":
        attention = {"FusedLlamaAttention": 3}
    assert kinds == attention | {"FusedLlamaMLP": 3, "FusedRMSNorm": 7}
    assert re.search(r"3 x \w+Attention -> Fused\w+Attention$", str(report), re.MULTILINE)
    for mask, logits in zip(masks, expected, strict=True):
        close(states(built, mask), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["inference", "training"])
@torch.no_grad()
def test_every_weight_exists_once_and_comes_back(built, mode, dtype):
    built.to(dtype)
    state, modules = copy.deepcopy(built.state_dict()), dict(built.named_modules())
    expected, before = states(built), weight_bytes(built)
    report = accelerate(built, mode)
    fused = states(built)
    assert weight_bytes(built) <= 1.01 * before
    copied = copy.deepcopy(built)
    for one in (built, copied):
        assert one.state_dict().keys() == state.keys()
        assert all(torch.equal(t, state[key]) for key, t in one.state_dict().items())
    report.undo()
    assert dict(built.named_modules()) == modules
    assert all(torch.equal(t, state[key]) for key, t in built.state_dict().items())
    assert torch.equal(states(built), expected)
    for parameter in built.parameters():
        parameter.zero_()
    assert torch.equal(states(copied), fused)  # a copy shares nothing


def test_it_is_saved_as_it_was_loaded(tmp_path):
    built = DECODERS["qwen2"]()
    state = copy.deepcopy(built.state_dict())
    accelerate(built)
    states(built)
    built.save_pretrained(tmp_path)
    again = type(built).from_pretrained(tmp_path)
    assert all(torch.equal(t, state[key]) for key, t in again.state_dict().items())
    torch.save(built, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert isinstance(whole.model.layers[0].self_attn, FusedLlamaAttention)
    assert torch.equal(states(whole), states(built))


@pytest.mark.parametrize("order", ["lora first", "accelerate first"])
def test_lora_survives(built, order):
    peft = pytest.importorskip("peft")

    def adapted(one):
        targets = ["q_proj", "v_proj", "o_proj"]
        one = peft.get_peft_model(one, peft.LoraConfig(r=2, target_modules=targets))
        torch.manual_seed(1)
        with torch.no_grad():
            for key, parameter in one.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.2)
        return one.eval()

    with torch.no_grad():
        plain = states(built)
        eager = adapted(copy.deepcopy(built))
        if order == "accelerate first":
            accelerate(built)
            states(built)
            built = adapted(built)
        else:
            built = adapted(built)
            accelerate(built)
        expected = states(eager.base_model.model)
        close(states(built.base_model.model), expected)
        assert (expected - plain).abs().max() > 1e-2
        close(states(built.merge_and_unload()), expected)


@pytest.mark.parametrize("inner", ["self_attn.k_proj", "self_attn.o_proj", "self_attn", "mlp"])
@torch.no_grad()
def test_hooks_see_and_change_what_they_did(built, inner):
    fused = copy.deepcopy(built)
    accelerate(fused)
    plain = states(fused)

    def double(module, args, output):
        return (
            tuple(x if x is None else x * 2 for x in output) if inner == "self_attn" else 2 * output
        )

    for one in (built, fused):
        handle = one.model.layers[1].get_submodule(inner).register_forward_hook(double)
    changed = states(fused)
    close(changed, states(built))
    assert (changed - plain).abs().max() > 1e-2
    handle.remove()
    close(states(fused), plain)


@torch.no_grad()
def test_what_hooks_move_is_left_alone(built):
    hooks = pytest.importorskip("accelerate.hooks")
    expected = states(built)
    attention = built.model.layers[1].self_attn
    hooks.add_hook_to_module(attention, hooks.AlignDevicesHook("cpu", offload=True))
    report = accelerate(built)
    assert list(report.kept) == ["model.layers.1.self_attn"]
    assert "device_map" in report.kept["model.layers.1.self_attn"]
    assert built.model.layers[1].self_attn is attention
    close(states(built), expected)


@pytest.mark.parametrize("mask", [None, LEFT], ids=["open", "padded"])
def test_training_has_the_eager_gradients(built, mask):
    fused, gradients = copy.deepcopy(built), []
    accelerate(fused, "training")
    for one in (built, fused):
        states(one.train(), mask).square().mean().backward()
        gradients.append([p.grad for p in one.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 20
    for ours, theirs in zip(*reversed(gradients), strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7


# What only transformers' decoders have.


@pytest.fixture(params=[name for name in DECODERS if name != "published"])
def stock(request):
    return DECODERS[request.param]()


GENERATIONS = {
    "greedy": {},
    "padded": {"attention_mask": LEFT},
    "beams": {"attention_mask": LEFT, "num_beams": 3},
    "static": {"cache_implementation": "static"},
}


DECODE = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize("how", GENERATIONS)
@torch.no_grad()
def test_generation_is_the_same(stock, how):
    expected = stock.generate(IDS, **DECODE, **GENERATIONS[how])
    accelerate(stock)
    assert torch.equal(stock.generate(IDS, **DECODE, **GENERATIONS[how]), expected)


@pytest.mark.parametrize("heads", [4, 2])
@torch.no_grad()
def test_our_cache_is_written_in_place(heads, monkeypatch):
    built, calls = llama(heads=heads), []
    expected = built.generate(IDS, **DECODE)
    accelerate(built)
    append = KVCache.rotary_append
    monkeypatch.setattr(
        KVCache, "rotary_append", lambda self, *args: calls.append(1) or append(self, *args)
    )
    cache = KVCache(built.config, 4)  # it must grow
    assert torch.equal(built.generate(IDS, **DECODE, past_key_values=cache), expected)
    assert len(calls) == 3 * 6


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_are_recomputed_train_alike(reentrant):
    built = llama(heads=2)
    fused, gradients = copy.deepcopy(built), []
    accelerate(fused, "training")
    for one in (built, fused):
        one.gradient_checkpointing_enable({"use_reentrant": reentrant})
        states(one.train()).square().mean().backward()
        gradients.append([p.grad for p in one.parameters()])
    for ours, theirs in zip(*reversed(gradients), strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_hidden_states_and_attentions_are_still_there(attention):
    built = llama(heads=2, attention=attention)
    fused = copy.deepcopy(built)
    accelerate(fused)
    for config in (built.config, fused.config):
        config.output_hidden_states, config.output_attentions = True, attention == "eager"
    expected, found = built(IDS, attention_mask=LEFT), fused(IDS, attention_mask=LEFT)
    assert len(found.hidden_states) == 3 + 1
    for key in ("hidden_states", "attentions"):
        for ours, theirs in zip(found.get(key) or (), expected.get(key) or (), strict=True):
            close(ours[:, ..., 4:, :], theirs[:, ..., 4:, :])
    assert attention == "sdpa" or found.attentions[0].shape == (2, 4, 11, 11)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_dropout_draws_what_it_did(attention):
    built = llama(attention=attention, attention_dropout=0.5)
    fused = copy.deepcopy(built)
    accelerate(fused, "training")
    for mode in (True, False):
        logits = []
        for one in (built.train(mode), fused.train(mode)):
            torch.manual_seed(0)
            logits.append(states(one))
        close(logits[1], logits[0])


@torch.no_grad()
def test_who_looks_both_ways_still_does():
    built = llama()
    causal = states(built)
    for layer in built.model.layers:
        layer.self_attn.is_causal = False
    expected = states(built)
    accelerate(built)
    close(states(built), expected)
    assert (expected - causal).abs().max() > 1e-2


def test_autocast_rounds_as_eager(stock):
    fused = copy.deepcopy(stock)
    accelerate(fused, "training")
    with torch.no_grad():
        truth = states(stock)
        with torch.autocast("cpu", torch.bfloat16):
            expected, found = states(stock), states(fused)
    assert found.dtype == expected.dtype
    assert (found - truth).norm() <= 1.25 * (expected - truth).norm()


@pytest.mark.parametrize("heads", [4, 2])
@torch.no_grad()
def test_the_operator_serves_where_it_can(heads, monkeypatch):
    built, calls = llama(heads=heads), []
    attention = kernels.attention

    def counted(q, k, v, mask="full", **options):
        calls.append((mask, tuple(q.shape), tuple(k.shape)))
        return attention(q, k, v, mask, **options)

    monkeypatch.setattr(kernels, "attention", counted)
    accelerate(built)
    cache = built(IDS, use_cache=True).past_key_values
    prefill = [("causal", (2, 4, 11, 16), (2, 4, 11, 16))] * 3 if heads == 4 else []
    assert calls == prefill  # keys of shared heads would have to be copied
    calls.clear()
    built(IDS[:, :1], past_key_values=cache)
    assert calls == [("full", (2, heads, 4 // heads, 16), (2, heads, 12, 16))] * 3
    calls.clear()
    built(IDS, attention_mask=LEFT)
    assert not calls


@torch.no_grad()
def test_what_cannot_be_proved_equal_stays():
    from transformers.models.llama.modeling_llama import LlamaAttention

    class Doubled(LlamaAttention):
        def forward(self, *args, **kwargs):
            output, weights = super().forward(*args, **kwargs)
            return output * 2, weights

    built, qwen3 = llama(heads=2), llama("Qwen3", heads=2)
    layers = built.model.layers
    layers[0].self_attn.__class__ = Doubled
    original = layers[1].self_attn.forward
    layers[1].self_attn.forward = lambda *args, **kwargs: original(*args, **kwargs)
    expected = states(built), states(qwen3)
    with pytest.raises(ValueError, match="q_norm, k_norm beside its projections"):
        accelerate(qwen3, strict=True)
    kept = accelerate(built).kept
    assert list(kept) == [f"model.layers.{index}.self_attn" for index in (0, 1)]
    assert "Doubled is not known to compute what LlamaAttention does" in str(kept)
    assert "its forward was replaced" in str(kept)
    accelerate(qwen3)
    close(states(built), expected[0])
    close(states(qwen3), expected[1])


@torch.no_grad()
def test_calls_in_other_ways_are_answered_by_the_eager_module():
    attention = llama().model.layers[0].self_attn
    holder = nn.ModuleDict({"attention": attention})
    x, narrow = torch.randn(2, 5, 64), (torch.ones(1, 5, 8), torch.zeros(1, 5, 8))
    accelerate(holder)
    with pytest.raises(RuntimeError, match="must match the size"):  # its own message
        holder["attention"](x, position_embeddings=narrow, attention_mask=None)
    with pytest.raises(TypeError):
        holder["attention"](x)
