"""`accelerate` on transformers' LLaMA, its kin, and the composite that has one inside."""

import copy
from collections import Counter
from functools import partial

import pytest
import torch
from foreign_decoders import DECODERS, IDS, LEFT, close, llama, states
from torch import nn

from internvl_engine import accelerate, kernels
from internvl_engine.fused import FusedLlamaLayer
from internvl_engine.generation import KVCache


@pytest.fixture(params=[name for name in DECODERS if name != "published"])
def stock(request):
    return DECODERS[request.param]()


@torch.no_grad()
def test_every_row_has_its_own_positions(stock):
    positions = torch.stack((torch.arange(11), torch.arange(11).square()))
    expected = stock(IDS, position_ids=positions).logits
    accelerate(stock)
    close(stock(IDS, position_ids=positions).logits, expected)
    assert (stock(IDS).logits[1] - expected[1]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Mistral"])
@torch.no_grad()
def test_the_attention_function_is_told_what_it_was(kind, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    told = []

    def attend(module, q, k, v, mask, **others):
        told.append({"is_causal": module.is_causal, "index": module.layer_idx} | others)
        return v.repeat_interleave(2, 1).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "recorder", attend)
    window = {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}
    built = llama(kind, heads=2, **window)
    built.config._attn_implementation = "recorder"
    expected = states(built)
    before = list(told)
    accelerate(built)
    close(states(built), expected)
    for ours, theirs in zip(told[3:], before, strict=True):
        either = {"cache_position", "use_cache"}  # defaults that no attention function reads
        assert ours.keys() | either == theirs.keys() | either
        assert all(ours[key] == theirs[key] for key in ours if key != "position_ids")


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

    def counted(name, operator, q, k, v, *mask, **options):
        kinds = (kind for kind in mask if isinstance(kind, str))
        calls.append((name, *kinds, tuple(q.shape), tuple(k.shape)))
        return operator(q, k, v, *mask, **options)

    for name in ("attention", "decode_attention", "attention_with_mask"):
        monkeypatch.setattr(kernels, name, partial(counted, name, getattr(kernels, name)))
    accelerate(built)
    cache = built(IDS, use_cache=True).past_key_values
    assert calls == [("attention", "causal", (2, 4, 11, 16), (2, heads, 11, 16))] * 3
    calls.clear()
    built(IDS[:, :1], past_key_values=cache)
    assert calls == [("decode_attention", (2, 4, 1, 16), (2, heads, 12, 16))] * 3
    calls.clear()
    built(IDS, attention_mask=LEFT)
    assert [call[0] for call in calls] == ["attention_with_mask"] * 3


@torch.no_grad()
def test_what_cannot_be_proved_equal_stays():
    from transformers.models.llama.modeling_llama import LlamaAttention

    class Doubled(LlamaAttention):
        def forward(self, *args, **kwargs):
            output, weights = super().forward(*args, **kwargs)
            return output * 2, weights

    built, other = llama(heads=2), llama("Qwen3", heads=2)
    layers = built.model.layers
    for layer in other.model.layers:
        layer.self_attn.q_norm.bias = nn.Parameter(torch.ones(16))
    layers[0].self_attn.__class__ = Doubled
    original = layers[1].self_attn.forward
    layers[1].self_attn.forward = lambda *args, **kwargs: original(*args, **kwargs)
    expected = states(built), states(other)
    with pytest.raises(ValueError, match="q_norm, k_norm beside its projections"):
        accelerate(other, strict=True)
    kept = accelerate(built).kept
    assert list(kept) == [f"model.layers.{index}.self_attn" for index in (0, 1)]
    assert "its forward takes args, which is unknown here" in str(kept)
    assert "its forward was replaced" in str(kept)
    assert len(accelerate(other).replaced) == 3 + 3 * 3 + 1  # MLPs, and norms but those
    close(states(built), expected[0])
    close(states(other), expected[1])


@torch.no_grad()
def test_eager_attention_without_a_mask_sees_everything():
    built = llama(attention="eager")
    call = {"position_embeddings": built.model.rotary_emb(torch.randn(1), torch.arange(5)[None])}
    call |= {"hidden_states": torch.randn(2, 5, 64), "attention_mask": None}
    expected = built.model.layers[0].self_attn(**call)
    accelerate(built)
    found = built.model.layers[0].self_attn(**call)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    assert (found[1] > 0).all()


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
    assert isinstance(whole.model.layers[0], FusedLlamaLayer)
    assert torch.equal(states(whole), states(built))


@pytest.mark.parametrize("text", ["llama", "qwen2"])
@torch.no_grad()
def test_transformers_composite(text):
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    vision = {
        "hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96,
        "image_size": [28, 28], "patch_size": [7, 7], "num_hidden_layers": 2,
        "norm_type": "rms_norm", "use_qk_norm": True,
    }  # fmt: skip
    llm = {
        "model_type": text, "vocab_size": 61, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    config = InternVLConfig(vision_config=vision, text_config=llm, image_token_id=60)
    built = InternVLForConditionalGeneration(config).eval()
    for parameter in built.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    ids = torch.cat((torch.full((2, 4), 60), torch.randint(3, 60, (2, 5))), 1)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 28, 28)}
    inputs["attention_mask"] = torch.ones_like(ids)
    decode = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected, tokens = built(**inputs).logits, built.generate(**inputs, **decode)
    report = accelerate(built, strict=True)
    kinds = Counter(entry.fused for entry in report.entries)
    assert kinds["FusedLlamaLayer"] == kinds["FusedTransformersVisionLayer"] == 2
    close(built(**inputs).logits, expected)
    assert torch.equal(built.generate(**inputs, **decode), tokens)
    report.undo()
    assert torch.equal(built(**inputs).logits, expected)
