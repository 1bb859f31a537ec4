"""What a decoding step multiplies with the norm of its states: gate and up, and the vocabulary."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_engine import kernels
from internvl_engine.kernels import _decoding, norm_linear

from .cases import Case, Provider, compiled, ours

WIDTH, EPS = 4096, 1e-6
# label: (rows, features, epilogue)
SHAPES = {
    "gate and up, one caption": (1, 22016, "swiglu"),
    "gate and up, 8 captions": (8, 22016, "swiglu"),
    "vocabulary, one caption": (1, 49954, "none"),
}
FORMS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "wide": lambda w: (w,),
    "int8": kernels.quantize_int8,
    "int4": kernels.quantize_int4,
}


def cases(device: str) -> Iterator[Case]:
    """Reads the weight, and little else."""
    for label, (rows, features, epilogue) in SHAPES.items():
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        x, norm_weight = torch.randn(rows, WIDTH, **options), torch.randn(WIDTH, **options)
        weight = torch.randn(features, WIDTH, **options) / WIDTH**0.5
        for form, parts, dense in in_forms(weight):
            arguments = (parts, features, None, epilogue, norm_weight, squares_of(x), EPS)
            rest = (dense, None, epilogue, norm_weight, None, EPS)
            providers = {
                **ours("norm_linear", partial(norm_linear, x, *arguments)),
                "eager": Provider(partial(_decoding.norm_linear, x, *rest)),
                **yardstick(x, dense),
                **compiled(_decoding.norm_linear, x, *rest),
            }
            # int8 and int4 on the CPU round x too.
            tolerance = 8.0 if form == "wide" or device == "cuda" else 64.0
            name, read = f"{label}, {form}", nbytes(parts)
            yield Case(
                "norm_linear", name, tuple(x.shape), x.dtype, providers, read, tolerance=tolerance
            )


def in_forms(weight: Tensor) -> Iterator[tuple[str, tuple[Tensor, ...], Tensor]]:
    """(form, its parts, the values that they stand for) of a weight."""
    rows, columns = weight.shape
    for form, make in FORMS.items():
        parts = make(weight)
        dense = weight
        if form == "int8":
            dense = kernels.dequantize_int8(parts[0], parts[1], columns, weight.dtype)
        elif form == "int4":
            dense = kernels.dequantize_int4(parts[0], parts[1], rows, columns, weight.dtype)
        yield form, parts, dense


def squares_of(x: Tensor) -> Tensor:
    """As the kernel before leaves them."""
    return _decoding.sums_of_squares(x)


def nbytes(parts: tuple[Tensor, ...]) -> int:
    """Of the weight; sums of rows are for processors."""
    return sum(part.nbytes for part in parts[:2])


def yardstick(x: Tensor, weight: Tensor) -> dict[str, Provider]:
    """The bare product with the wide weight."""
    return {"F.linear, wide, alone": Provider(partial(F.linear, x, weight), same=False)}
