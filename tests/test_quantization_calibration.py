"""Rounding that knows what a layer is given."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from internvl_engine import accelerate
from internvl_engine.quantization import quantize
from internvl_engine.quantization.calibration import record_inputs
from internvl_engine.schemes import Rule, Scheme
from internvl_engine.weights import Int4Tensor

from models import model, pixels

INT4 = Scheme("everything", (Rule("weight$", "int4"),))


def test_rows_of_every_call_are_kept_and_the_model_stays_as_it_was():
    built = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 4), nn.Linear(4, 4))
    x = torch.randn(5, 4, 8)

    def run(each):
        assert not each.training and not torch.is_grad_enabled()
        for part in x.split(2):
            each[2](each[0](part))

    found = record_inputs(built, list(built), run, rows=7)
    assert built.training and not any(m._forward_pre_hooks for m in built)
    assert set(found) == {id(built[0]), id(built[2])}  # the others were not called
    rows = found[id(built[0])]
    assert rows.shape == (7, 8)
    given = {tuple(row) for row in x.flatten(0, 1).tolist()}
    kept = [tuple(row) for row in rows.tolist()]
    assert set(kept) <= given and len(set(kept)) == 7
    assert kept[0] == tuple(x[0, 0].tolist()) and kept[-1] == tuple(x[-1, -1].tolist())


@torch.no_grad()
def test_products_are_nearer_where_the_inputs_are_alike():
    torch.manual_seed(0)
    mixed = torch.randn(512, 16) @ torch.randn(16, 128)  # 16 directions of 128
    linear = nn.Sequential(nn.Linear(128, 64, bias=False))
    expected = linear(mixed)
    weight, errors = linear[0].weight.clone(), []
    for calibration in (None, lambda m: m(mixed)):
        linear[0].weight = nn.Parameter(weight.clone())
        quantize(linear, INT4, calibration=calibration, only_faster=False)
        held = linear[0].weight
        assert isinstance(held, Int4Tensor)
        errors.append((F.linear(mixed, held.dense()) - expected).norm() / expected.norm())
    assert errors[1] < 0.5 * errors[0] < 0.1


@torch.no_grad()
def test_pictures_calibrate_a_model():
    built, x = model(), pixels(4)
    expected = built.encode_image(x, "InternVL-G")
    report = accelerate(built, quantize="int4", calibration=x, only_faster=False)
    assert any(entry.form == "int4" for entry in report.weights)
    assert not any(module._forward_pre_hooks for module in built.modules())
    found = built.encode_image(x, "InternVL-G")
    assert F.cosine_similarity(found, expected).min() > 0.9


def test_what_cannot_run_a_model_is_refused():
    for wrong, message in ((3, "a function of the model"), (torch.ones(1, 3, 4, 4), "has none of")):
        with pytest.raises(TypeError, match=message):
            quantize(nn.Sequential(nn.Linear(64, 64)), INT4, calibration=wrong)
