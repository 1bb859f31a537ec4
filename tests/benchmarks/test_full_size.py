"""The full-size measurement on the smallest model: what it writes is sound, and what it says."""

import sys

import pytest
import torch

from internvl_engine.benchmarks.full_size import measure, page, status, watching
from internvl_engine.benchmarks.random_checkpoint import write_random
from internvl_engine.configuration import InternVLConfig
from internvl_engine.modeling import InternVL_G
from internvl_engine.weights import Int4Tensor, Int8Tensor, QuantizedTensor

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = tmp_path_factory.mktemp("random")
    for form in ("int8", "int4", None):
        write_random(found / str(form), form, InternVLConfig.from_preset("nano"), "300KB")
    return found


@pytest.mark.parametrize("form", ["int8", "int4", "None"])
def test_random_weights_are_sound(folders, form):
    model = InternVL_G.from_pretrained(folders / form, dtype=torch.float32)
    quantized = {n: p for n, p in model.named_parameters() if isinstance(p, QuantizedTensor)}
    kinds = {type(p) for p in quantized.values()}
    assert kinds == {"int8": {Int8Tensor}, "int4": {Int4Tensor, Int8Tensor}, "None": set()}[form]
    for name, weight in quantized.items():
        values = weight.dense()
        if isinstance(weight, Int8Tensor):  # the sums are those of the levels, absent rows are 0
            levels = weight.packed.transpose(1, 2).flatten(2).flatten(0, 1)
            assert torch.equal(levels.sum(1, dtype=torch.int32)[: len(values)], weight.sums), name
            assert not levels[len(values) :].any(), name
    for name in ("vision_model.encoder.layers.1.mlp.fc1", "qllama.model.layers.0.mlp.up_proj"):
        weight = model.get_parameter(f"{name}.weight")
        values = weight.dense() if isinstance(weight, QuantizedTensor) else weight
        # Variance 1 / columns, less what is cut at the ends.
        assert 0.9 < values.std() * weight.shape[1] ** 0.5 < 1.1, name


def test_what_is_measured(folders):
    found = measure(folders / "int4", new_tokens=3, dtype=torch.float32)
    held = InternVL_G.from_pretrained(folders / "int4", dtype=torch.float32).parameters()
    assert found["weights"] == sum(parameter.nbytes for parameter in held)
    assert 0 < found["load_s"] < 30 and 0 <= found["load_anonymous"] <= found["anonymous"]
    assert found["touched"] > status("RssAnon") > 0
    for turn in ("first", "again"):
        assert all(value > 0 for value in found[turn].values())
    text = page(found)
    assert "loaded in" in text and "again: image C" in text and text.count("tokens/s") == 2


def test_the_most_memory_is_seen():
    with watching("RssAnon") as most:
        before = most()
        block = torch.ones(50_000_000)
        assert block.sum() > 0
        del block
        assert most() - before > 150e6
