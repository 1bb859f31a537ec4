"""Fused modules are no further from their eager ones in float64 than eager in the same dtype."""

import copy

import pytest
import torch
from torch import nn

from internvl_engine import accelerate
from internvl_engine.fused import FusedAttentionPooling, FusedDecoderLayer, FusedVisionLayer
from internvl_engine.fused.qllama import NormalizedImage
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


@torch.no_grad()
def test_an_image_is_normalised_once_and_then_forgotten():
    shared, image = NormalizedImage(), torch.randn(2, 5, 8)
    normed = shared.of(image, 1e-6)
    assert shared.of(image, 1e-6) is normed
    assert shared.of(image.clone(), 1e-6) is not normed
    shared.of(image, 1e-6)
    del image
    assert shared._normed is None and shared._image is None


@torch.no_grad()
def test_every_layer_normalises_the_image_together():
    fused = model()
    accelerate(fused)
    images = {
        id(layer._cross.image)
        for layer in fused.qllama.model.layers
        if isinstance(layer, FusedDecoderLayer) and layer._cross is not None
    }
    assert len(images) == 1
