"""`accelerate` on what tells transformers' decoders apart: packed projections, experts, sinks."""

import copy
from collections import Counter
from functools import partial

import pytest
import torch
from foreign_decoders import DECODERS, IDS, LEFT, close, llama, states

from internvl_engine import accelerate, kernels
from internvl_engine.generation import KVCache

EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4,
           "num_experts_per_tok": 2}  # fmt: skip
WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
KINDS = {
    "phi3": (partial(llama, "Phi3"), {"FusedPackedLayer": 3, "FusedRMSNorm": 1}),
    "phi3 grouped": (
        partial(llama, "Phi3", heads=2, sliding_window=5),
        {"FusedPackedLayer": 3, "FusedRMSNorm": 1},
    ),
    "qwen3 windows": (
        partial(llama, "Qwen3", heads=1, use_sliding_window=True, **WINDOW),
        {"FusedLlamaLayer": 3, "FusedRMSNorm": 1},
    ),
    "qwen3 experts": (
        partial(llama, "Qwen3Moe", heads=2, mlp_only_layers=[1], **EXPERTS),
        # The layer without experts is whole; of the others the attention and the norms beside it.
        {"FusedLlamaLayer": 1, "FusedLlamaAttention": 2, "FusedRMSNorm": 2 * 2 + 1},
    ),
    "gpt_oss": (
        partial(llama, "GptOss", heads=2, attention="eager", **EXPERTS, **WINDOW),
        {"FusedLlamaAttention": 3, "FusedRMSNorm": 7},
    ),
}
DECODE = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def build(name):
    if "layer_types" in KINDS[name][0].keywords:
        return KINDS[name][0](layer_types=WINDOW["layer_types"][:3])
    return KINDS[name][0]()


@pytest.fixture(params=KINDS)
def name(request):
    return request.param


@torch.no_grad()
def test_the_numbers_stay_and_everything_is_fused(name):
    built, masks = build(name), (None, LEFT, LEFT.flip(1))
    expected = [states(built, mask) for mask in masks]
    report = accelerate(built, strict=True)
    kinds = Counter(entry.fused for entry in report.entries)
    kinds.pop("FusedLlamaMLP", None)  # of transformers 4's experts
    assert kinds == KINDS[name][1]
    for mask, logits in zip(masks, expected, strict=True):
        close(states(built, mask), logits)
    report.undo()
    assert torch.equal(states(built), expected[0])


@pytest.mark.parametrize("how", [{}, {"attention_mask": LEFT, "num_beams": 3}])
@torch.no_grad()
def test_generation_is_the_same(name, how):
    built = build(name)
    expected = built.generate(IDS, **DECODE, **how)
    accelerate(built)
    assert torch.equal(built.generate(IDS, **DECODE, **how), expected)


@pytest.mark.parametrize("kind", ["phi3 grouped", "gpt_oss"])
def test_training_has_the_eager_gradients(kind):
    built = build(kind)
    fused, gradients = copy.deepcopy(built), []
    accelerate(fused, "training")
    for one in (built, fused):
        states(one.train(), LEFT).square().mean().backward()
        gradients.append([p.grad for p in one.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 15
    for ours, theirs in zip(*reversed(gradients), strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7


@torch.no_grad()
def test_heads_that_are_rotated_in_part_are_kept():
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    built = llama("Phi3", partial_rotary_factor=0.5, rope_parameters=rope)
    expected = states(built)
    report = accelerate(built)
    reason = "it rotates 0.5 of the channels of a head"
    assert report.kept == {f"model.layers.{index}.self_attn": reason for index in range(3)}
    assert len(report.replaced) == 3 + 7
    close(states(built), expected)


@pytest.mark.parametrize("kind", ["grouped", "qwen3"])
@torch.no_grad()
def test_eager_attention_is_the_operator_too(kind, monkeypatch):
    """A layer has no use for the probabilities."""
    built, calls = DECODERS[kind](attention="eager"), []
    expected = [states(built, mask) for mask in (None, LEFT)]
    tokens = built.generate(IDS, **DECODE)
    accelerate(built, strict=True)
    operator = kernels.attention_with_mask
    monkeypatch.setattr(
        kernels, "attention_with_mask", lambda *args: calls.append(1) or operator(*args)
    )
    for mask, logits in zip((None, LEFT), expected, strict=True):
        close(states(built, mask), logits)
    assert len(calls) == 2 * 3
    assert torch.equal(built.generate(IDS, **DECODE), tokens)


def packed_mask():
    """Two sequences in a row, of 4 and 7 tokens."""
    rows, columns = torch.arange(11)[:, None], torch.arange(11)
    return ((columns <= rows) & ((rows < 4) == (columns < 4)))[None, None].expand(2, -1, -1, -1)


@pytest.mark.parametrize("additive", [False, True])
@torch.no_grad()
def test_masks_that_the_caller_made(additive):
    mask = packed_mask()
    if additive:
        mask = torch.where(mask, torch.rand(11, 11), torch.finfo(torch.float32).min)
    built = llama(heads=2)
    expected = states(built)
    theirs = built(IDS, attention_mask=mask).logits
    accelerate(built)
    close(built(IDS, attention_mask=mask).logits, theirs)
    assert (theirs - expected).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@torch.no_grad()
def test_assisted_decoding_is_the_same(kind):
    built, helper = DECODERS[kind](), llama(heads=2)
    expected = built.generate(IDS[:1], **DECODE, assistant_model=helper)
    assert torch.equal(expected, built.generate(IDS[:1], **DECODE))
    for one in (built, helper):
        accelerate(one)
    assert torch.equal(built.generate(IDS[:1], **DECODE, assistant_model=helper), expected)


@pytest.mark.parametrize("kind", ["phi3", "qwen3 experts"])
@pytest.mark.parametrize("mask", [None, LEFT])
@torch.no_grad()
def test_our_cache_serves(kind, mask):
    built = build(kind)
    expected = built.generate(IDS, **DECODE, attention_mask=mask)
    accelerate(built)
    cache = KVCache(built.config, 5)  # it must grow
    found = built.generate(IDS, **DECODE, attention_mask=mask, past_key_values=cache)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mask", [None, LEFT, LEFT.flip(1)])
@torch.no_grad()
def test_a_prompt_in_parts(mask):
    """Queries behind a cache, where the mask of causality is no square."""
    built, found = llama(heads=2), []
    fused = copy.deepcopy(built)
    accelerate(fused)
    for one in (built, fused):
        part = None if mask is None else mask[:, :6]
        cache = one(IDS[:, :6], attention_mask=part).past_key_values
        logits = one(IDS[:, 6:], attention_mask=mask, past_key_values=cache).logits
        found.append(logits if mask is None else logits[mask[:, 6:].bool()])
    close(found[1], found[0])


@torch.no_grad()
def test_layers_are_called_in_other_ways():
    built, x = llama(heads=2), torch.randn(2, 5, 64)
    angles = built.model.rotary_emb(x, torch.arange(5)[None])
    layer, fused = built.model.layers[0], copy.deepcopy(built.model.layers[0])
    expected = layer(x, position_embeddings=angles)
    accelerate(torch.nn.ModuleList([fused]), strict=True)
    close(fused(x, None, position_embeddings=angles), expected)
    close(fused(hidden_states=x, position_embeddings=angles, num_items_in_batch=7), expected)
    close(fused(x, position_embeddings=angles, output_attentions=None), expected)
    with pytest.raises(TypeError):  # the eager layer's own
        fused(x)
