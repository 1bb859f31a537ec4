"""Fused modules are no further from their eager ones in float64 than eager in the same dtype."""

import copy
from functools import partial

import pytest
import torch
from foreign_blocks import TOKENS, TOWERS, WIDTH, call, tower
from foreign_decoders import llama
from foreign_decoders import published as published_decoder
from torch import nn

from internvl_engine import accelerate
from internvl_engine.fused import (
    FusedAttentionPooling,
    FusedCrossAttention,
    FusedDecoderLayer,
    FusedLlamaAttention,
    FusedLlamaLayer,
    FusedPreNormBlock,
    FusedPublishedAttention,
    FusedVisionLayer,
)
from internvl_engine.modeling.masks import AttentionMask

from models import model
from numerics import assert_as_accurate_as_eager

DTYPES = [torch.float32, torch.bfloat16]


def outliers(*shape):
    """Activations of which a few channels are 1,000 times the rest, as large models have them."""
    x = torch.randn(*shape)
    x[..., 3::17] *= 1000
    return x


def check(eager: nn.Module, fused: nn.Module, dtype, *inputs, **options) -> None:
    """The fused module of a dtype against copies of the eager one."""
    copies = {d: copy.deepcopy(eager).to(d) for d in (dtype, torch.float64)}

    def reference(*args):
        wanted = next(
            a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()
        )
        output = copies[wanted](*args, **options)
        return output[0] if isinstance(output, tuple) else output

    output = fused(*inputs, **options)
    output = output[0] if isinstance(output, tuple) else output
    assert_as_accurate_as_eager(output, reference, *inputs)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=[torch.randn, outliers], ids=["normal", "outliers"])
def draw(request):
    return request.param


def fused_of(built, dtype):
    fused = copy.deepcopy(built).to(dtype)
    accelerate(fused)
    return fused


@pytest.mark.parametrize("tokens", [17, 1, 5])
@torch.no_grad()
def test_vision_layer(dtype, draw, tokens):
    built = model()
    eager = built.vision_model.encoder.layers[-1]
    fused = fused_of(built, dtype).vision_model.encoder.layers[-1]
    assert isinstance(fused, FusedVisionLayer)
    check(eager, fused, dtype, draw(2, tokens, 48).to(dtype))


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_pre_norm_blocks(name, dtype, draw):
    built = tower(name)
    fused = fused_of(built, dtype)
    assert isinstance(fused.blocks[0], FusedPreNormBlock)

    class Blocks(nn.Module):
        def __init__(self, blocks):
            super().__init__()
            self.blocks = blocks

        def forward(self, x):
            return call(name, self.blocks, x)

    check(Blocks(built), Blocks(fused), dtype, draw(2, TOKENS, WIDTH).to(dtype))


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("kind, tokens", [("full", 6), ("prefix", 11), ("causal", 4)])
@torch.no_grad()
def test_decoder_layer(dtype, draw, image, kind, tokens):
    built = model()
    rotary = built.qllama.model.rotary_emb
    fused = fused_of(built, dtype).qllama.model.layers[2]
    eager = built.qllama.model.layers[2]
    assert isinstance(fused, FusedDecoderLayer) and eager.cross_attn is not None

    class Layer(nn.Module):  # the rotary tables follow the dtype
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, hidden, vision):
            positions, tables = rotary.at(None, 0, hidden)
            mask = AttentionMask(kind, tokens, tokens, 6)
            vision = vision if image else None
            return self.layer(hidden, mask, positions, None, False, vision, 1, tables)[0]

    hidden, vision = draw(2, tokens, 64).to(dtype), draw(2, 17, 48).to(dtype)
    check(Layer(eager), Layer(fused), dtype, hidden, vision)


@torch.no_grad()
def test_pooler(dtype, draw):
    built = model()
    fused = fused_of(built, dtype).clip_projector
    assert isinstance(fused, FusedAttentionPooling)
    check(built.clip_projector, fused, dtype, draw(3, 17, 48).to(dtype))


def attention_of(build):
    """(attention module, its arguments after the states) of a decoder's last layer."""
    built = build()
    positions = torch.arange(11)[None]
    if hasattr(built.model, "rotary_emb"):
        rotary = built.model.rotary_emb

        def arguments(x):
            return {"position_embeddings": rotary(x, positions), "attention_mask": None}

        return built, arguments
    mask = built.model.mask(torch.ones(2, 11), 11, torch.float32, True)
    return built, lambda x: {"position_ids": positions, "attention_mask": mask.to(x.dtype)}


@pytest.mark.parametrize(
    "build",
    [published_decoder, llama, partial(llama, heads=2), partial(llama, "Qwen3", heads=2)],
)
@torch.no_grad()
def test_foreign_attention(build, dtype, draw):
    built, arguments = attention_of(build)

    class Attention(nn.Module):  # the rotary tables follow the dtype
        def __init__(self, model):
            super().__init__()
            self.attention = model.model.layers[-1].self_attn

        def forward(self, x):
            return self.attention(x, **arguments(x))[0]

    fused = Attention(copy.deepcopy(built).to(dtype))
    accelerate(nn.ModuleDict({"one": fused.attention}))
    assert isinstance(fused.attention, FusedLlamaAttention | FusedPublishedAttention)
    x = draw(2, 11, 64)
    x = (x / x.square().mean(-1, keepdim=True).sqrt()).to(dtype)  # as after a norm
    check(Attention(built), fused, dtype, x)


@pytest.mark.parametrize("build", [partial(llama, heads=2), partial(llama, "Phi3", heads=2)])
@torch.no_grad()
def test_foreign_layer(build, dtype, draw):
    built, arguments = attention_of(build)

    class Layer(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.layer = model.model.layers[-1]

        def forward(self, x):
            return self.layer(x, **arguments(x))

    fused = Layer(fused_of(built, dtype))
    assert isinstance(fused.layer, FusedLlamaLayer)
    check(Layer(built), fused, dtype, draw(2, 11, 64).to(dtype))


@torch.no_grad()
def test_foreign_cross_attention(dtype, draw):
    built = published_decoder()
    fused = fused_of(built, dtype).model.layers[0].cross_attn
    assert isinstance(fused, FusedCrossAttention)
    states, image = draw(6, 6, 64).to(dtype), draw(2, 17, 48).to(dtype)
    check(built.model.layers[0].cross_attn, fused, dtype, states, image, repeat_time=3)
