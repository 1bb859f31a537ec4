"""Inputs of the operators of a decoding step: a weight in each form, and what it stands for."""

import torch
from torch import Tensor

from internvl_engine import kernels
from internvl_engine.kernels import _decoding

FORMS = ("wide", "int8", "int4", "int4 of 128")
DTYPES = (torch.bfloat16, torch.float16)


def weight_in(form: str, weight: Tensor) -> tuple[Tensor, ...]:
    """What a weight consists of in a form."""
    if form == "wide":
        return (weight,)
    if form == "int8":
        return kernels.quantize_int8(weight)
    return kernels.quantize_int4(weight, 128 if form.endswith("128") else 64)


def dense(form: str, parts: tuple[Tensor, ...], features: int, columns: int, dtype) -> Tensor:
    """The values of a weight, in the dtype asked for."""
    if form == "wide":
        return parts[0].to(dtype)
    if form == "int8":
        return kernels.dequantize_int8(*parts[:2], columns, dtype)
    return kernels.dequantize_int4(*parts, features, columns, dtype)


def normed(x: Tensor, norm_weight: Tensor) -> tuple[Tensor, Tensor]:
    """(norm_weight, squares of x), as the operators take them."""
    return norm_weight, _decoding.sums_of_squares(x)
