"""Which parts fit into memory: against the built model's counts, and what is advised."""

import math

import pytest
import torch

from internvl_engine.checkpoint import PARTS, needs
from internvl_engine.checkpoint.fitting import (
    PARAMETERS_14B,
    QUANTIZED_14B,
    advice,
    fitting,
    parameters_by_parts,
    quantized_by_parts,
    quantized_nbytes,
)
from internvl_engine.checkpoint.forms import rule_of
from internvl_engine.configuration import InternVLConfig
from internvl_engine.modeling import InternVL_G
from internvl_engine.schemes import scheme_of
from internvl_engine.weights import KINDS

GB = 10**9


def test_the_numbers_are_those_of_the_model():
    with torch.device("meta"):
        model = InternVL_G(InternVLConfig())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert parameters_by_parts(sizes) == PARAMETERS_14B
    assert tuple(PARAMETERS_14B) == PARTS
    held = {name: size for name, size in sizes.items() if needs("c")(name)}
    expected = {name: PARAMETERS_14B[name] for name in ("image", "text", "c")}
    assert parameters_by_parts(held, "c") == expected


def test_a_24_gb_machine():
    fits = {(each.parts, each.dtype) for each in fitting(24 * GB) if each.fits}
    wide = {("image", "bfloat16"), ("text", "bfloat16")}
    assert fits == wide | {(parts, form) for parts in PARTS for form in ("int8", "int4")}
    exact = next(each for each in fitting(24 * GB) if each.parts == "c")
    assert exact.nbytes == 4 * 12_620_029_697
    # A tenth is left for activations: 12.6e9 * 2 * 1.1 = 27.8 GB
    assert not any(each.fits for each in wide_c(int(27.7 * GB)))
    assert any(each.fits for each in wide_c(int(27.8 * GB)))


def wide_c(available):
    return [each for each in fitting(available, quantized={}) if each.parts == "c"]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_bytes_of_forms_are_those_of_their_layouts(scheme):
    """By the forms themselves, of every weight that takes one, and of the whole model."""
    with torch.device("meta"):
        model = InternVL_G(InternVLConfig())
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name, shape in shapes.items():
        rule = rule_of(scheme_of(scheme), model, name, shape)
        expected = 2 * math.prod(shape)
        if rule is not None:
            layout = KINDS[rule.form].inner_layout(shape, **rule.options)
            expected = sum(math.prod(size) * dtype.itemsize for size, dtype in layout.values())
        assert quantized_nbytes(scheme, name, shape) == expected, name
    assert quantized_by_parts(shapes)[scheme] == QUANTIZED_14B[scheme]
    odd = KINDS["int4"].inner_layout((50, 70), group=64)
    size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in odd.values())
    assert quantized_nbytes("int4", "model.layers.0.mlp.up_proj.weight", (50, 70)) == size


def test_advice_names_the_most_that_fits_first():
    text = advice(24 * GB)
    assert text == (
        "parts='all' in float32 (55.3 GB) and a small batch do not fit into 24.0 GB; these do: "
        "parts='all' with quantize='int8' (14.0 GB), parts='all' with quantize='int4' (10.5 GB), "
        "parts='text' in bfloat16 (13.4 GB), parts='image' in bfloat16 (11.9 GB)"
    )
    first = advice(40 * GB, dtype="float32").partition("these do: ")[2]
    assert first.startswith(
        "parts='all' in bfloat16 (27.7 GB), parts='all' with quantize='int8' (14.0 GB), "
        "parts='all' with quantize='int4' (10.5 GB), parts='caption' in bfloat16"
    )


def test_advice_of_a_part_is_no_larger_part():
    text = advice(24 * GB, parts="image", dtype="float32")
    assert "parts='image' in bfloat16" in text and "parts='text'" not in text
    assert text.endswith("parts='image' with quantize='int4' (6.0 GB)")


@pytest.mark.parametrize("dtype, available", [("float32", 61 * GB), ("bfloat16", 31 * GB)])
def test_no_advice_where_it_fits(dtype, available):
    assert advice(available, dtype=dtype) is None


def test_no_advice_helps_a_small_machine():
    assert advice(3 * GB).endswith("no part of it does, in any dtype or form")
