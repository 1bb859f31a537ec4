"""Prompts of a zero-shot classifier through QLLaMA at real width: ids to embeddings.

    shared prefix   embedding/texts.py: what prompts begin with runs once, and padding is left out
    unpadded        the same without sharing
    padded to 80    as the published scripts do, on the same accelerated model
    eager           the readable model on the prompts padded to 80

C = 4096, F = 11008, 32 heads; one layer of 32, they are all alike. The prompts are as long as
ImageNet's under its 80 templates, 14 ids on the mean: `<s>summarize:`, a template, one to six
pieces of a label, a full stop, `</s>`. The ids themselves are random.
"""

import copy
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from internvl_engine.acceleration import accelerate
from internvl_engine.configuration import InternVLConfig
from internvl_engine.embedding.texts import embed_rows
from internvl_engine.modeling.internvl import InternVLModel
from internvl_engine.processing.padding import pad_rows

from .cases import Case, Provider
from .encoder import DTYPE, counted

PROMPTS = {"cuda": 4096, "cpu": 128}
TEMPLATES = 8
PADDED = "padded to 80"
MAX_TOKENS = 8192


def cases(
    device: str, count: int | None = None, layers: int = 1,
    dtypes: Sequence[torch.dtype] = (DTYPE,), **sizes: int,
) -> Iterator[Case]:  # fmt: skip
    """A case for each dtype.

    Args:
        device: "cpu" or "cuda".
        count: of prompts; PROMPTS of the device where None.
        layers: depth.
        dtypes: of the weights.
        sizes: of QLLaMA, where not those of the 14B.
    """
    rows = prompts(count or PROMPTS[device])
    for dtype in dtypes:
        yield case(random_model(device, dtype, num_hidden_layers=layers, **sizes), rows)


def case(model: InternVLModel, rows: list[tuple[int, ...]]) -> Case:
    """Every way through one model of random weights."""
    accelerated = copy.deepcopy(model)
    accelerate(accelerated, strict=True)
    parameter = model.text_projection
    padded = [tensor.to(parameter.device) for tensor in pad_rows(rows, "right", "max_length", 80)]

    def ours(shares: bool) -> Tensor:
        return embed_rows(accelerated, rows, MAX_TOKENS, parameter.device, shares)

    providers = {
        "shared prefix": Provider(lambda: ours(True)),
        "unpadded": Provider(lambda: ours(False)),
        PADDED: Provider(lambda: accelerated.encode_text(padded[0], padded[1]).float()),
        "eager": Provider(lambda: model.encode_text(padded[0], padded[1]).float()),
    }
    with torch.no_grad():
        flops, out = counted(lambda: embed_rows(model, rows, MAX_TOKENS, parameter.device, False))
    layers = model.qllama.model.layers
    traffic = sum(p.nbytes for p in layers.parameters()) + out.nbytes
    mean = sum(map(len, rows)) / len(rows)
    label = f"{len(rows)} prompts of {mean:.1f} ids, {len(layers)} layer{'s' * (len(layers) > 1)}"
    return Case("text", label, (len(rows), 80), parameter.dtype, providers, traffic, flops,
                baseline=PADDED, tolerance=32.0)  # fmt: skip  # sums of 11,008 in another order


def prompts(
    count: int, templates: int = TEMPLATES, vocabulary: int = 2000
) -> list[tuple[int, ...]]:
    """Ids of so many prompts: every label under every template, label by label."""
    draw = random.Random(0)

    def words(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(100, vocabulary) for _ in range(length))

    forms = [words(draw.randint(3, 7)) for _ in range(templates)]
    rows: list[tuple[int, ...]] = []
    while len(rows) < count:
        label = words(draw.choice((1, 2, 2, 3, 3, 4, 6)))
        rows += [(1, 19, 67, 29, *form, *label, 15, 2) for form in forms]
    return rows[:count]


def random_model(device: str, dtype: torch.dtype, **sizes: int) -> InternVLModel:
    """QLLaMA of the given sizes with weights that keep activations at unit scale."""
    config = InternVLConfig.from_preset("nano")
    text = {
        "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32,
        "vocab_size": 2000, "cross_attention_frequency": 1 << 20,
    }  # fmt: skip
    for name, value in (text | sizes).items():
        setattr(config.qllama_config, name, value)
    torch.manual_seed(0)
    model = InternVLModel(config).to(device, dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model
