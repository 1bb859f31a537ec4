"""Weights that cannot be quantized, while they load and while they are converted."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from internvl_engine.assets import nano_directory
from internvl_engine.checkpoint import CheckpointError
from internvl_engine.conversion import convert
from internvl_engine.modeling import InternVL_G

FORMS = ("int8", "int4", "fp8")
NAME = "qllama.model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def source():
    [path] = nano_directory().glob("*.safetensors")
    return path


@pytest.fixture
def folder(tmp_path, source):
    """The embedded model, wide, with one weight to be changed."""
    folder = tmp_path / "wide"
    folder.mkdir()
    for path in source.parent.iterdir():
        if path.is_file() and path != source:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def with_weight(folder, source, change):
    state = load_file(source)
    state[NAME] = change(state[NAME])
    save_file(state, folder / source.name)
    return folder


def with_value(value):
    def change(weight):
        weight[3, 5] = value
        return weight

    return change


@pytest.mark.parametrize("form", FORMS)
def test_values_that_no_form_has_are_named(folder, source, tmp_path, form):
    with_weight(folder, source, with_value(torch.nan))
    message = f"{NAME} in .*wide.*: quantize_{form}: the weight has NaN or infinite values"
    with pytest.raises(CheckpointError, match=message):
        InternVL_G.from_pretrained(folder, quantize=form)
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "out", quantize=form)
    assert not list((tmp_path / "out").iterdir())


def test_values_too_large_for_int4_are_named(folder, source):
    with_weight(folder, source, with_value(1e6))
    with pytest.raises(CheckpointError, match=f"{NAME} in .*values up to 9.994e.05, too large for"):
        InternVL_G.from_pretrained(folder, quantize="int4")
    InternVL_G.from_pretrained(folder, quantize="int8")


@pytest.mark.parametrize("dtype", [torch.float64, "float64"])
def test_a_dtype_that_forms_do_not_compute_in(tmp_path, dtype):
    message = "dtype=.*float64.*: weights that quantize='int8' makes compute in float32"
    with pytest.raises(ValueError, match=message):
        InternVL_G.from_pretrained(nano_directory(), quantize="int8", dtype=dtype)
    with pytest.raises(ValueError, match=message):
        InternVL_G.from_pretrained(nano_directory(), quantize="int8", torch_dtype=dtype)
    with pytest.raises(ValueError, match=message):
        convert(nano_directory(), tmp_path / "out", quantize="int8", dtype=dtype)
    assert not (tmp_path / "out").exists()
    convert(nano_directory(), tmp_path / "int8", quantize="int8")
    with pytest.raises(ValueError, match=message):
        InternVL_G.from_pretrained(tmp_path / "int8", dtype=dtype)


def test_weights_that_are_stored_in_float64(folder, source, tmp_path):
    with_weight(folder, source, torch.Tensor.double)
    with pytest.raises(ValueError, match=f"{NAME} in .*wide: .* it is float64: give dtype= also"):
        convert(folder, tmp_path / "out", quantize="int8")
    assert not (tmp_path / "out").exists()
    convert(folder, tmp_path / "out", quantize="int8", dtype="bfloat16")
    loaded = InternVL_G.from_pretrained(folder, quantize="int8", dtype="bfloat16")
    weight, expected = (m.get_parameter(NAME).detach() for m in (
        loaded, InternVL_G.from_pretrained(tmp_path / "out", dtype="bfloat16")))  # fmt: skip
    assert torch.equal(weight.packed, expected.packed) and weight.FORM == "int8"
