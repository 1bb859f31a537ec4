"""A decoding step's products that end in the residual stream, and the next norm's statistic."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from internvl_engine.kernels import _decoding, linear_squares

from .bench_norm_linear import in_forms, nbytes, yardstick
from .cases import Case, Provider, compiled, ours

WIDTH = 4096
SHAPES = {  # label: (rows, columns)
    "o, one caption": (1, 4096),
    "down, one caption": (1, 11008),
    "down, 8 captions": (8, 11008),
}


def cases(device: str) -> Iterator[Case]:
    """Reads the weight, and little else."""
    for label, (rows, columns) in SHAPES.items():
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        x, residual = torch.randn(rows, columns, **options), torch.randn(rows, WIDTH, **options)
        weight = torch.randn(WIDTH, columns, **options) / columns**0.5
        for form, parts, dense in in_forms(weight):
            run = partial(linear_squares, x, parts, WIDTH, None, residual)
            providers = {
                **ours("linear_squares", run),
                "eager": Provider(partial(_decoding.linear_squares, x, dense, None, residual)),
                **yardstick(x, dense),
                **compiled(_decoding.linear_squares, x, dense, None, residual),
            }
            tolerance = 8.0 if form == "wide" or device == "cuda" else 64.0
            name, read = f"{label}, {form}", nbytes(parts)
            yield Case(
                "linear_squares", name, tuple(x.shape), x.dtype, providers, read,
                tolerance=tolerance,
            )  # fmt: skip
