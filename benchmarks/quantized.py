"""One layer of each tower with quantized weights at real width, beside wide ones and others.

    vision_int8  InternViT-6B: C = 3200, 25 heads of 128, F = 12800, 257 tokens an image
    decode_int4  QLLaMA-8B: C = 4096, F = 11008, one token a row and no cache: products alone

Speeds are related to ours with wide weights. A form's error is that of the layer, from eager's.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from internvl_engine.acceleration import accelerate
from internvl_engine.configuration import InternVisionConfig
from internvl_engine.modeling.masks import AttentionMask
from internvl_engine.modeling.qllama import LlamaDecoderLayer, LlamaRotaryEmbedding

from .cases import Case, Provider, rival
from .encoder import Towers, counted, random_state
from .layers import spread
from .quantized_rivals import INT4_ERROR, INT8_ERROR, int4, int8

ROWS = (1, 8)
ERRORS = {"int8": INT8_ERROR, "int4": INT4_ERROR, "fp8": INT8_ERROR}


def cases(
    device: str, dtype: torch.dtype = torch.bfloat16,
    schemes: tuple[str, ...] = ("int8", "int4"), compiles: bool = True, images: int = 4,
) -> Iterator[Case]:  # fmt: skip
    """A layer of the vision tower for `images` images, and one of QLLaMA for each of ROWS."""
    # In int4 the vision tower's weights are int8 too.
    towers = tuple(scheme for scheme in schemes if scheme != "int4") or ("int8",)
    yield vision(device, images, None, compiles, dtype, towers)
    yield from decode(device, ROWS, None, dtype, schemes)


def vision(
    device: str, images: int, config: InternVisionConfig | None = None, compiles: bool = True,
    dtype: torch.dtype = torch.bfloat16, schemes: tuple[str, ...] = ("int8",),
) -> Case:  # fmt: skip
    """A layer of InternViT; x is (images, tokens, C)."""
    config = config or InternVisionConfig()
    config.num_hidden_layers = 1
    towers = Towers(config, random_state(config, device, dtype))
    layer = towers.eager.encoder.layers[0]
    tokens = 1 + (config.image_size // config.patch_size) ** 2
    x = torch.randn(images, tokens, config.hidden_size, device=device).to(dtype)
    wide = f"ours, {str(dtype)[6:]}"
    providers = {
        wide: Provider(lambda: towers.accelerated.encoder(x)[0]),
        "eager": Provider(lambda: layer(x)),
        **rival("transformers, SDPA", lambda: towers.theirs.encoder(x)[0]),
    }
    for scheme in schemes:
        around = _quantized(layer, scheme)
        providers[f"ours, {scheme}"] = Provider(partial(around[0], x), error=ERRORS[scheme])
    if compiles:
        torch._dynamo.reset()
        compiled = torch.compile(towers.theirs.encoder, dynamic=False)
        providers |= rival("torch.compile", lambda: compiled(x)[0])
    if device == "cpu":
        providers |= int8(layer, x, compiles)
    label = f"{images} image{'s' * (images > 1)}, {tokens} tokens each"
    return _case("vision_int8", label, layer, x, providers, wide, images=images)


def decode(
    device: str, rows: tuple[int, ...], config: LlamaConfig | None = None,
    dtype: torch.dtype = torch.bfloat16, schemes: tuple[str, ...] = ("int8", "int4"),
) -> Iterator[Case]:  # fmt: skip
    """A layer of QLLaMA for each number of rows; x is (rows, 1, C)."""
    config = config or LlamaConfig(num_query_token=96, vision_hidden_size=3200)
    torch.manual_seed(0)
    layer = spread(LlamaDecoderLayer(config, 1)).to(device, dtype).eval().requires_grad_(False)
    ours = nn.Sequential(copy.deepcopy(layer))
    accelerate(ours, strict=True)
    wide = f"ours, {str(dtype)[6:]}"
    for count in rows:
        x = torch.randn(count, 1, config.hidden_size, device=device).to(dtype)
        providers = {wide: Provider(_Step(ours[0], x)), "eager": Provider(_Step(layer, x))}
        providers |= rival("transformers, SDPA", _transformers(layer, config, x))
        for scheme in schemes:
            quantized = _Step(_quantized(layer, scheme)[0], x)
            providers[f"ours, {scheme}"] = Provider(quantized, error=ERRORS[scheme])
        if device == "cpu":
            providers |= int4(_Step(layer, x), x)
        label = f"{count} row{'s' * (count > 1)}"
        yield _case("decode_int4", label, layer, x, providers, wide, tokens=count)


class _Step(nn.Module):
    """A decoder layer on the first token of each row (rows, 1, C)."""

    def __init__(self, layer: Any, x: Tensor) -> None:
        super().__init__()
        head_dim = layer.self_attn.head_dim
        self.layer, self.x = layer, x
        self.places = LlamaRotaryEmbedding(head_dim).to(x.device).at(None, 0, x)

    def forward(self, x: Tensor | None = None) -> Tensor:
        """(rows, 1, C); x is its own where none is given."""
        x = self.x if x is None else x
        positions, tables = self.places
        return self.layer(x, AttentionMask("full", 1, 1), positions, None, False, None, 1, tables)[
            0
        ]


def _transformers(layer: nn.Module, config: LlamaConfig, x: Tensor) -> Callable[[], Tensor]:
    """transformers' own LLaMA layer, with the same weights, on the first token of each row."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer as Theirs
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding as Rotary

    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"
    theirs = Theirs(config, 0).to(x.device, x.dtype).eval().requires_grad_(False)
    theirs.load_state_dict(layer.state_dict(), strict=False)  # it holds no table of angles
    first = torch.zeros(1, 1, dtype=torch.int64, device=x.device)
    places = Rotary(config).to(x.device)(x, first)

    def run() -> Tensor:
        output = theirs(x, position_embeddings=places)
        return output if isinstance(output, Tensor) else output[0]

    return run


def _quantized(layer: nn.Module, scheme: str) -> nn.Sequential:
    """A copy of a layer with weights in a form of the scheme."""
    around = nn.Sequential(copy.deepcopy(layer))
    accelerate(around, strict=True, quantize=scheme)
    return around


def _case(
    operator: str, label: str, layer: nn.Module, x: Tensor, providers: dict[str, Provider],
    baseline: str, **counts: Any,
) -> Case:  # fmt: skip
    flops, out = counted(providers["eager"].run)
    traffic = sum(p.nbytes for p in layer.parameters()) + x.nbytes + out.nbytes
    shape = tuple(x.shape)
    return Case(operator, label, shape, x.dtype, providers, traffic, flops, baseline=baseline,
                **counts)  # fmt: skip
