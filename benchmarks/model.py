"""InternVL-14B with wide and with quantized weights: how fast, and how its cost grows.

    encode_c, encode_g  images to embeddings, by their number
    resolution          one image, by its size; the position table is resized for each
    text                prompts padded to 80, unpadded, and with their prefix computed once: text.py
    decode              captions, tokens a second: decode.py
    text_length         texts to embeddings, by their length
    fidelity            what quantized weights lose: verification/fidelity.py
    load                seconds and memory of each form's own checkpoint: loading.py
    vision_int8, decode_int4  single layers beside other packages' quantized ones: quantized.py

Two sizes: the embedded nano model, whole; and the real widths with one layer of the vision tower,
two of QLLaMA and a small vocabulary, since all layers are alike. The whole of the 14B is measured
by full_size.py, in memory and seconds.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from internvl_engine.acceleration import accelerate
from internvl_engine.assets import nano_directory
from internvl_engine.configuration import InternVLConfig
from internvl_engine.modeling import InternVL_G
from internvl_engine.verification.fidelity import fidelity

from . import decode, loading, quantized, text
from .cases import Case, Finding, Provider, rival
from .encoder import counted, randomise
from .quantized import ERRORS
from .report import Suites

SIZES = ("nano", "layer")
BATCHES = {"cpu": (1, 2, 4, 8), "cuda": (1, 8, 64)}
RESOLUTIONS = (364, 448)  # beside the model's own 224
LENGTHS = {"nano": (8, 16), "layer": (8, 16, 40, 80)}  # ids of a text
END = 2  # of a text
MODELS = {"nano": ("nano", "nano-chat"), "layer": ("real width",)}  # of verification.fidelity
TEXTS = {"cpu": 8, "cuda": 256}


def suites(
    only: Sequence[str] = (), size: str = "layer", dtype: torch.dtype = torch.bfloat16,
    schemes: tuple[str, ...] = ("int8", "int4"), compiles: bool = True,
) -> Suites:  # fmt: skip
    """The parts in `only`, all of the size where empty.

    Args:
        size: one of SIZES; single layers and long texts are measured at real width only.
        schemes: of `accelerate(quantize=)`, beside the wide weights.
        compiles: torch.compile among the rivals.

    Raises:
        ValueError: there is no such part or size.
    """

    def images(device: str) -> Iterator[Case]:
        forms = Forms(built(size, dtype, device), schemes)
        resolutions = RESOLUTIONS if size == "layer" else ()
        yield from encode(forms, BATCHES[device], compiles, resolutions)

    def captions(device: str) -> Iterator[Case]:
        yield from decode.cases(Forms(built(size, dtype, device), schemes))

    def lengths(device: str) -> Iterator[Case]:
        forms = Forms(built(size, dtype, device), schemes)
        yield from texts(forms, TEXTS[device], LENGTHS[size])

    if size not in SIZES:
        raise ValueError(f"bench: --size must be one of {', '.join(SIZES)} or 14b, got {size!r}")
    parts: dict[str, Callable[[str], Iterator[Case | Finding]]] = {
        "encode": images,
        "lengths": lengths,
        "decode": captions,
        "fidelity": lambda device: lost(MODELS[size], schemes, dtype),
        "load": lambda device: loading.findings(configured(size), dtype, schemes),
    }
    if size == "layer":
        parts["text"] = lambda device: text.cases(device, dtypes=(dtype,))
        parts["layers"] = lambda device: quantized.cases(device, dtype, schemes, compiles)
    if unknown := set(only) - set(parts):
        raise ValueError(
            f"bench: no {', '.join(sorted(unknown))} at size {size}; there are {', '.join(parts)}"
        )
    return {name: parts[name] for name in only or parts}


class Forms:
    """One model with wide and with quantized weights."""

    def __init__(self, eager: InternVL_G, schemes: tuple[str, ...]) -> None:
        """eager: in evaluation; its weights are copied for every form."""
        self.eager = eager
        self.wide = f"ours, {str(eager.dtype)[6:]}"
        self.models = {self.wide: accelerated(eager)}
        self.models |= {f"ours, {scheme}": accelerated(eager, scheme) for scheme in schemes}
        self.errors = {f"ours, {scheme}": ERRORS[scheme] for scheme in schemes}

    def case(
        self, operator: str, label: str, run: Callable[[Any], Tensor], shape: tuple[int, ...],
        read: Any, compiles: bool = False,
        varies: tuple[str, float] | None = None, **counts: int,
    ) -> Case:  # fmt: skip
        """Every form on run(model), whose results are alike.

        Args:
            read: the part of the eager model whose weights one call reads.
            compiles: torch.compile of the eager model among the rivals.
            varies: as Case has it.
            counts: images or tokens of a call.
        """
        providers = {
            name: Provider(partial(run, model), error=self.errors.get(name))
            for name, model in self.models.items()
        }
        providers["eager"] = Provider(lambda: run(self.eager))
        if compiles:
            torch._dynamo.reset()
            compiled = torch.compile(run, dynamic=False)
            providers |= rival("torch.compile", lambda: compiled(self.eager))
        flops, _ = counted(providers["eager"].run)
        traffic = sum(parameter.nbytes for parameter in read.parameters())
        return Case(operator, label, shape, self.eager.dtype, providers, traffic, flops,
                    baseline="eager", varies=varies, **counts)  # fmt: skip


def texts(forms: Forms, count: int, lengths: tuple[int, ...]) -> Iterator[Case]:
    """So many texts of one length to embeddings, for each of the lengths."""
    device = next(forms.eager.parameters()).device
    vocabulary = forms.eager.config.qllama_config.vocab_size
    for length in lengths:
        ids = torch.randint(3, vocabulary, (count, length), dtype=torch.int64, device=device)
        ids[:, -1] = END
        run = partial(_embed, ids=ids, mask=torch.ones_like(ids))
        label, shape = f"{count} texts of {length} ids", (count, length)
        read = forms.eager.language_model
        yield forms.case("text_length", label, run, shape, read, varies=("ids", length))


def _embed(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    return model.encode_text(ids, mask)


def lost(
    models: Sequence[str], schemes: Sequence[str], dtype: torch.dtype, count: int | None = None
) -> Iterator[Finding]:
    """Right answers, or cosines, with the weights of each scheme beside those with wide ones.

    Args:
        models: of verification.fidelity.
        dtype: that products are computed in.
        count: held-out pictures, or scenes; None is all of them.
    """
    for found in fidelity(schemes, models, dtype=dtype, count=count):
        values = {
            "wide": found.wide, "quantized": found.value, "as wide": found.agreement,
            "bytes of bfloat16": found.bytes_part,
        }  # fmt: skip
        label = f"{found.model}, {found.measure}, {found.scheme}"
        text = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        yield Finding("fidelity", label, values, f"  {text}")


def encode(
    forms: Forms, batches: tuple[int, ...], compiles: bool = True,
    resolutions: tuple[int, ...] = RESOLUTIONS,
) -> Iterator[Case]:  # fmt: skip
    """C and G embeddings by batch, then C embeddings of one image by resolution."""
    side = forms.eager.config.image_size
    for mode, name in (("InternVL-C", "encode_c"), ("InternVL-G", "encode_g")):
        for batch in batches:
            yield _encoding(forms, name, mode, batch, side, compiles, ("images", batch))
    patch = forms.eager.config.vision_config.patch_size
    if resolutions:
        pixels = ("pixels a side", side)
        yield _encoding(forms, "resolution", "InternVL-C", 1, side, False, pixels)
    for other in resolutions:
        for model in (forms.eager, *forms.models.values()):
            model.vision_model.resize_pos_embeddings(side, other, patch)
        side = other
        pixels = ("pixels a side", side)
        yield _encoding(forms, "resolution", "InternVL-C", 1, side, False, pixels)


def _encoding(
    forms: Forms, name: str, mode: str, batch: int, side: int, compiles: bool,
    varies: tuple[str, float],
) -> Case:  # fmt: skip
    device = next(forms.eager.parameters()).device
    pixels = torch.randn(batch, 3, side, side, dtype=torch.float32, device=device)
    pixels = pixels.to(forms.eager.dtype)

    def run(model: Any) -> Tensor:
        return model.encode_image(pixels, mode)

    read = forms.eager if name == "encode_g" else forms.eager.vision_model
    label = f"{batch} image{'s' * (batch > 1)} of {side} px"
    shape = tuple(pixels.shape)
    return forms.case(name, label, run, shape, read, compiles, varies, images=batch)


def built(size: str, dtype: torch.dtype, device: str) -> InternVL_G:
    """The eager model of one of SIZES."""
    if size == "nano":
        model = InternVL_G.from_pretrained(nano_directory(), dtype=dtype)
        return model.to(device).eval().requires_grad_(False)
    return randomised(configured(size), dtype, device)


def configured(size: str) -> InternVLConfig:
    """The configuration of one of SIZES."""
    if size == "nano":
        return InternVLConfig.from_preset("nano")
    config = InternVLConfig()
    config.vision_config.num_hidden_layers = 1
    config.qllama_config.num_hidden_layers = 2
    config.qllama_config.vocab_size = 4000
    return config


def randomised(config: InternVLConfig, dtype: torch.dtype, device: str) -> InternVL_G:
    """A model with weights that keep activations at unit scale."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = InternVL_G(config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    return randomise(model)


def accelerated(model: InternVL_G, scheme: str | None = None) -> InternVL_G:
    """A copy with the fused modules, and with quantized weights where a scheme is given."""
    ours = copy.deepcopy(model)
    accelerate(ours, quantize=scheme)
    return ours
