"""Which parts fit into memory: against the built model's counts, and what is advised."""

import pytest
import torch

from internvl_engine.checkpoint import PARTS, needs
from internvl_engine.checkpoint.fitting import (
    PARAMETERS_14B,
    advice,
    fitting,
    parameters_by_parts,
)
from internvl_engine.configuration import InternVLConfig
from internvl_engine.modeling import InternVL_G

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
    assert fits == {("image", "bfloat16"), ("text", "bfloat16")}
    exact = next(each for each in fitting(24 * GB) if each.parts == "c")
    assert exact.nbytes == 4 * 12_620_029_697
    # A tenth is left for activations: 12.6e9 * 2 * 1.1 = 27.8 GB
    assert not any(each.fits for each in fitting(int(27.7 * GB)) if each.parts == "c")
    assert any(each.fits for each in fitting(int(27.8 * GB)) if each.parts == "c")


def test_advice_names_the_most_that_fits_first():
    text = advice(24 * GB)
    assert text == (
        "parts='all' in float32 (55.3 GB) and a small batch do not fit into 24.0 GB; these do: "
        "parts='text' in bfloat16 (13.4 GB), parts='image' in bfloat16 (11.9 GB)"
    )
    first = advice(40 * GB, dtype="float32").partition("these do: ")[2]
    assert first.startswith("parts='all' in bfloat16 (27.7 GB), parts='caption' in bfloat16")


def test_advice_of_a_part_is_no_larger_part():
    text = advice(24 * GB, parts="image", dtype="float32")
    assert "parts='image' in bfloat16" in text and "parts='text'" not in text


@pytest.mark.parametrize("dtype, available", [("float32", 61 * GB), ("bfloat16", 31 * GB)])
def test_no_advice_where_it_fits(dtype, available):
    assert advice(available, dtype=dtype) is None


def test_no_advice_helps_a_small_machine():
    assert advice(4 * GB).endswith("no part of it does, in any dtype")
