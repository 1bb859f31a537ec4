"""`undo()` of quantized weights: which bits come back, and what it says where they do not."""

import copy
import warnings

import pytest
import torch
from torch import nn

from internvl_engine import InternVL, accelerate
from internvl_engine.assets import nano_directory
from internvl_engine.modeling import InternVL_G
from internvl_engine.quantization import Rule, Scheme, quantize
from internvl_engine.quantization.changes import checksum
from internvl_engine.weights import QuantizedTensor

NAME = "vision_model.encoder.layers.0.mlp.fc1.weight"


def load(**options):
    return InternVL_G.from_pretrained(nano_directory(), dtype=torch.float32, **options).eval()


def wide_state():
    return {name: value.clone() for name, value in load().state_dict().items()}


def held(built):
    return [name for name, p in built.named_parameters() if isinstance(p, QuantizedTensor)]


def undone(report, **options):
    """The warnings of undo()."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        report.undo(**options)
    assert all(each.filename == __file__ for each in found)
    return [str(each.message) for each in found]


def scaled(built):
    built.get_parameter(NAME).mul_(1.5)


def loaded(built):
    values = built.get_parameter(NAME).dense() * 1.5
    built.load_state_dict({NAME: values}, strict=False)


@pytest.mark.parametrize("write", [scaled, loaded])
@torch.no_grad()
def test_what_was_written_to_a_form_stays(write):
    built, before = load(), wide_state()
    report = accelerate(built, quantize="int8")
    write(built)
    expected = built.get_parameter(NAME).dense()
    assert undone(report) == [
        f"undo: 1 weights ({NAME}) were written to since they were quantized, and have the rounded "
        "values now"
    ]
    assert torch.equal(built.get_parameter(NAME), expected)
    assert (expected - before[NAME] * 1.5).abs().max() < 0.05 * expected.abs().max()
    state = built.state_dict()
    assert all(torch.equal(state[n], value) for n, value in before.items() if n != NAME)


@torch.no_grad()
def test_an_adapter_that_was_merged_stays():
    peft = pytest.importorskip("peft")
    built, before = load(), wide_state()
    report = accelerate(built, quantize="int8")
    config = peft.LoraConfig(r=4, target_modules=["fc1"], init_lora_weights=False)
    merged = peft.get_peft_model(built, config).merge_and_unload()
    expected = merged.get_parameter(NAME).dense()
    assert not torch.allclose(expected, before[NAME], atol=0.02)
    messages = undone(report)
    assert len(messages) == 1 and "were written to since" in messages[0]
    assert torch.equal(merged.get_parameter(NAME), expected)


@pytest.mark.parametrize("given", [False, True], ids=["checkpoint", "state dict"])
@torch.no_grad()
def test_adapters_around_quantized_weights_do_not_hide_them(given):
    peft = pytest.importorskip("peft")
    built, before = load(), wide_state()
    report = accelerate(built, quantize="int8")
    config = peft.LoraConfig(r=4, target_modules=["fc1", "q_proj"])
    wrapped = peft.get_peft_model(built, config)
    assert not undone(report, source=before if given else None)
    state = wrapped.unload().state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())


@torch.no_grad()
def test_a_weight_whose_rows_were_in_another_order_is_another():
    built = load()
    weight = built.get_parameter(NAME)
    weight.copy_(weight.flip(0))
    expected = weight.clone()
    messages = undone(accelerate(built, quantize="int8"))
    assert len(messages) == 1 and f"undo: 1 weights ({NAME}) are in no checkpoint" in messages[0]
    assert (weight - expected).abs().max() < 0.02 * expected.abs().max()


def test_checksums_see_order_dtypes_and_strides():
    x = torch.arange(12, dtype=torch.float32).view(3, 4)
    assert checksum(x) == checksum(x.t().contiguous().t()) != checksum(x.flip(0))
    assert checksum(x[:0]) == 0
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.int8):
        assert checksum(x.to(dtype)) != checksum(x.flip(1).to(dtype))


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("call", [quantize, lambda m, s: accelerate(m, quantize=s)])
@torch.no_grad()
def test_a_weight_that_is_not_finite_is_named_before_anything_changes(call, value):
    built = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    built[1].weight[3, 4] = value
    before = copy.deepcopy(built.state_dict())
    with pytest.raises(ValueError, match=r"quantize: 1\.weight has NaN or infinite values"):
        call(built, "int8")
    assert all(
        torch.equal(now.nan_to_num(), before[name].nan_to_num())
        for name, now in built.state_dict().items()
    )


@torch.no_grad()
def test_a_weight_that_is_too_large_for_int4_is_named_before_anything_changes():
    built = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    scheme, before = Scheme("all", (Rule("", "int4"),)), built[0].weight.clone()
    built[1].weight[3, 4] = 5.2e5
    undone(quantize(built, scheme))
    built[0].weight.copy_(before)
    built[1].weight[3, 4] = -5.3e5
    with pytest.raises(ValueError, match=r"quantize: 1\.weight has values above 522240"):
        quantize(built, scheme)
    assert torch.equal(built[0].weight, before)


@torch.no_grad()
def test_weights_that_were_quantized_while_loading_stay_so_or_come_from_a_source():
    before = wide_state()
    engine = InternVL.from_pretrained(nano_directory(), dtype=torch.float32, quantize="int8")
    count, first = len(held(engine.model)), held(engine.model)[0]
    (message,) = undone(engine.report)
    assert message.startswith(f"undo: {count} weights ({first}, ...) stay quantized") and count > 9
    assert "undo(source=...)" in message and "Load the wide checkpoint" in message
    built = load(quantize="int8")
    built.get_parameter(NAME).mul_(1.5)
    (message,) = undone(accelerate(built), source=nano_directory())
    assert message.startswith(f"undo: 1 weights ({NAME}) stay quantized")
    assert held(built) == [NAME]
    state = built.state_dict()
    assert all(torch.equal(state[n], value) for n, value in before.items() if n != NAME)


@torch.no_grad()
def test_copies_of_modules_become_wide_too():
    built, before = load(), wide_state()
    report = accelerate(built, quantize="int8")
    built.vision_model = copy.deepcopy(built.vision_model)
    assert not undone(report)
    assert not held(built)
    assert all(torch.equal(t, before[name]) for name, t in built.state_dict().items())


@torch.no_grad()
def test_a_source_that_cannot_be_read_leaves_the_way_back_open(tmp_path):
    built, before = load(), wide_state()
    report = accelerate(built, quantize="int8")
    with pytest.raises(FileNotFoundError):
        report.undo(source=tmp_path / "missing")
    assert held(built)
    assert not undone(report)
    assert all(torch.equal(t, before[name]) for name, t in built.state_dict().items())
    assert not undone(report)


def test_another_form_of_what_is_quantized_already_is_refused_with_a_warning():
    built = load()
    accelerate(built, quantize="int8")
    count = len(held(built))
    with pytest.warns(UserWarning, match=r"quantize='int4' weights that are quantized already"):
        report = accelerate(built, quantize="int4")
    assert 0 < len(report.quantization.other) < count  # the scheme has int8 too
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(built, quantize="int8")
