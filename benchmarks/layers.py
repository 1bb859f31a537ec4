"""One layer of each tower at real width, against what people run today.

    vision       InternViT-6B: C = 3200, 25 heads of 128, F = 12800, 257 tokens an image
    vision_300m  InternViT-300M: C = 1024, 16 heads of 64, F = 4096, 1025 tokens a tile, LayerNorm;
                 an image of four tiles and its thumbnail, float32 and bfloat16
    qllama       QLLaMA-8B with cross-attention: C = 4096, 96 queries that read 257 x 3200
    decoder      Qwen2-0.5B, behind 1,300 tokens and in front of them: decoder.py

Speeds are related to the layer's four products through F.linear (vision), or to the eager layer.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig

from internvl_engine.acceleration import accelerate
from internvl_engine.configuration import InternVisionConfig
from internvl_engine.kernels import layout_of, linear_packed, pack
from internvl_engine.modeling.masks import AttentionMask
from internvl_engine.modeling.qllama import LlamaDecoderLayer, LlamaRotaryEmbedding
from internvl_engine.modeling.vision import InternVisionModel

from . import decoder
from .cases import Case, Provider, rival
from .encoder import DTYPE, Towers, counted, loaded, random_state, transformers_model
from .report import Suites

PRODUCTS = "four products, F.linear"
TILES = 5


def suites(only: Sequence[str] = (), images: int = 4) -> Suites:
    """The layers in `only`, all where empty. images: at a time; InternViT-300M has TILES.

    Raises:
        ValueError: there is no such layer.
    """
    layers: dict[str, Callable[[str], Iterator[Case]]] = {
        "vision": lambda device: iter([vision(device, images)]),
        "vision_300m": vision_300m,
        "qllama": lambda device: iter([qllama(device, images)]),
        "decoder": decoder.cases,
    }
    if unknown := set(only) - set(layers):
        names = ", ".join(sorted(unknown))
        raise ValueError(f"bench: no layer {names}; there are {', '.join(layers)}")
    return {name: layers[name] for name in only or layers}


def vision_300m(
    device: str, config: InternVisionConfig | None = None, compiles: bool = True
) -> Iterator[Case]:
    """A layer of InternViT-300M in both dtypes; x is (TILES, tokens, C)."""
    config = config or internvit_300m()
    for dtype in (torch.float32, DTYPE):
        yield vision(device, TILES, config, compiles, dtype, "vision_300m_layer")


def internvit_300m() -> InternVisionConfig:
    """The tower of the chat models from 1B to 8B."""
    return InternVisionConfig(
        hidden_size=1024, num_attention_heads=16, intermediate_size=4096, image_size=448,
        norm_type="layer_norm", qk_normalization=False, qkv_bias=True,
    )  # fmt: skip


def vision(
    device: str, images: int, config: InternVisionConfig | None = None, compiles: bool = True,
    dtype: torch.dtype = DTYPE, operator: str = "vision_layer",
) -> Case:  # fmt: skip
    """A layer of InternViT; x is (images, tokens, C)."""
    config = config or InternVisionConfig()
    config.num_hidden_layers = 1
    state = random_state(config, device, dtype)
    towers = Towers(config, state)
    foreign = transformers_model(config, state)
    accelerate(foreign, strict=True)
    tokens = 1 + (config.image_size // config.patch_size) ** 2
    x = torch.randn(images, tokens, config.hidden_size, device=device).to(dtype)
    providers = {
        **products(towers.eager.encoder.layers[0], x),
        "ours (accelerated)": Provider(lambda: towers.accelerated.encoder(x)[0]),
        "transformers, accelerated": Provider(lambda: foreign.encoder(x)[0]),
        "eager": Provider(lambda: towers.eager.encoder(x)[0]),
        **rival("transformers, SDPA", lambda: towers.theirs.encoder(x)[0]),
    }
    if dtype != torch.float32:
        wide = loaded(InternVisionModel, config, {name: t.float() for name, t in state.items()})
        wide_x = x.float()
        providers["eager, float32"] = Provider(lambda: wide.encoder(wide_x)[0])
    if compiles:
        torch._dynamo.reset()
        compiled = torch.compile(towers.theirs.encoder, dynamic=False)
        providers |= rival("torch.compile", lambda: compiled(x)[0])
    return _case(operator, images, towers.eager.encoder.layers[0], x, providers, PRODUCTS)


def products(layer: Any, x: Tensor) -> dict[str, Provider]:
    """What a layer cannot do without: its products, through F.linear, and packed on a CPU."""
    linears = (layer.attn.qkv, layer.attn.proj, layer.mlp.fc1, layer.mlp.fc2)
    wide = torch.rand(*x.shape[:-1], layer.mlp.fc2.in_features, device=x.device).to(x.dtype)
    inputs = (x, x, x, wide)

    def plain() -> Tensor:
        for x, linear in zip(inputs, linears, strict=True):
            y = F.linear(x, linear.weight, linear.bias)
        return y

    found = {PRODUCTS: Provider(plain, same=False)}
    if not all(layout_of(linear.weight) for linear in linears):
        return found
    packs = [pack(linear.weight) for linear in linears]

    def packed() -> Tensor:
        for x, linear, weight in zip(inputs, linears, packs, strict=True):
            y = linear_packed(x, weight, linear.out_features, linear.bias)
        return y

    return found | {"four products, packed": Provider(packed, same=False)}


def qllama(device: str, images: int, config: LlamaConfig | None = None) -> Case:
    """A layer of QLLaMA with cross-attention on its queries, as for image features."""
    config = config or LlamaConfig(num_query_token=96, vision_hidden_size=3200)
    queries, tokens = config.num_query_token, 257
    torch.manual_seed(0)
    layer = spread(LlamaDecoderLayer(config, 0)).to(device, DTYPE).eval().requires_grad_(False)
    around = nn.Sequential(copy.deepcopy(layer))
    accelerate(around, strict=True)
    hidden = torch.randn(images, queries, config.hidden_size, device=device).to(DTYPE)
    image = torch.randn(images, tokens, config.vision_hidden_size, device=device).to(DTYPE)
    mask = AttentionMask("full", queries, queries)
    head_dim = config.hidden_size // config.num_attention_heads
    positions, tables = LlamaRotaryEmbedding(head_dim).to(device).at(None, 0, hidden)
    arguments = (hidden, mask, positions, None, False, image, 1, tables)
    providers = {
        "ours (accelerated)": Provider(lambda: around[0](*arguments)[0]),
        "eager": Provider(lambda: layer(*arguments)[0]),
    }
    return _case("qllama_layer", images, layer, hidden, providers, "eager")


def _case(
    operator: str, images: int, layer: nn.Module, x: Tensor, providers: dict[str, Provider],
    baseline: str,
) -> Case:  # fmt: skip
    with torch.no_grad():
        flops, out = counted(providers["eager"].run)
    traffic = sum(p.nbytes for p in layer.parameters()) + x.nbytes + out.nbytes
    label = f"{images} image{'s' * (images > 1)}, {x.shape[1]} tokens each"
    shape = tuple(x.shape)
    return Case(operator, label, shape, x.dtype, providers, traffic, flops, images, baseline)


def spread(layer: nn.Module) -> nn.Module:
    """Weights that keep activations at unit scale."""
    for parameter in layer.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        else:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return layer
