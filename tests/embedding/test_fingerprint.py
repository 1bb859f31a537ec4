"""The fingerprint sees every change of the weights, and nothing else."""

import copy

import pytest
import torch
from tiny_engine import saved, tiny_engine
from torch import nn

from internvl_engine import InternVLModel, accelerate, kernels
from internvl_engine.embedding import fingerprint
from internvl_engine.embedding.fingerprint import RUN, RUNS, WHOLE, _samples, _step
from internvl_engine.weights import PackedTensor

TEXT = torch.tensor([[1, 30, 40, 50, 2]])


@pytest.fixture
def model() -> InternVLModel:
    return copy.deepcopy(tiny_engine().model)


def step(model) -> None:
    """One of an optimizer, small."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model.encode_text(TEXT).square().sum().backward()
    optimizer.step()


def load(model) -> None:
    model.load_state_dict(tiny_engine(1).model.state_dict())


def edit(model) -> None:
    with torch.no_grad():
        model.text_projection[3, 4] += 1


def edit_data(model) -> None:
    model.qllama.model.layers[1].mlp.gate_proj.weight.data.mul_(1.01)


def replace(model) -> None:
    model.qllama.model.norm.weight = nn.Parameter(2 * model.qllama.model.norm.weight.detach())


def adapt(model) -> None:
    model.wrap_qllama_lora(2)


@pytest.mark.parametrize("change", [step, load, edit, edit_data, replace, adapt])
def test_every_change_shows(model, change):
    before, exact = fingerprint(model), fingerprint(model, exact=True)
    assert fingerprint(model) == before and fingerprint(model, exact=True) == exact
    change(model)
    assert fingerprint(model)["text"] != before["text"]
    assert fingerprint(model, ["text"], exact=True)["text"] != exact["text"]
    assert (fingerprint(model)["vision"] == before["vision"]) == (change is not load)


def test_adapters_show_through_every_state(model):
    """What an adapter does may be in its switches alone, with every tensor as it was."""
    plain = fingerprint(model)
    model.wrap_qllama_lora(2)
    for name, weight in model.qllama.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight)
    seen = [plain["text"], fingerprint(model)["text"]]
    for layer in (module for module in model.modules() if hasattr(module, "scaling")):
        layer.scaling["default"] *= 2
    seen.append(fingerprint(model)["text"])
    with model.qllama.disable_adapter():
        seen.append(fingerprint(model)["text"])
    assert fingerprint(model)["text"] == seen[2]
    model.qllama.merge_adapter()
    seen.append(fingerprint(model)["text"])
    model.qllama = model.qllama.merge_and_unload()
    seen.append(fingerprint(model)["text"])
    assert len(set(seen)) == len(seen)
    assert fingerprint(model)["vision"] == plain["vision"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_acceleration_changes_nothing(model, dtype):
    model = model.to(dtype)
    before = fingerprint(model)
    report = accelerate(model)
    assert report.replaced
    assert fingerprint(model) == before
    assert fingerprint(model.train()) == before and fingerprint(model.eval()) == before
    exact = fingerprint(model, exact=True)
    edit_data(model)
    assert fingerprint(model)["text"] != before["text"]
    assert fingerprint(model, exact=True)["text"] != exact["text"]
    report.undo()
    assert fingerprint(model)["text"] != before["text"]


def test_offloaded_weights_are_looked_at(tmp_path_factory):
    whole = tiny_engine().model
    loaded = InternVLModel.from_pretrained(
        saved(tmp_path_factory), dtype="float32",
        device_map={"": "cpu", "qllama": "disk", "vision_model": "disk"},
    )  # fmt: skip
    assert any(weight.is_meta for weight in loaded.parameters())
    assert fingerprint(loaded) == fingerprint(whole)


def test_a_compiled_model_is_the_same_model(model):
    before = fingerprint(model)
    model.qllama.model = torch.compile(model.qllama.model)
    assert fingerprint(model) == before
    assert fingerprint(torch.compile(model)) == before


def test_the_dtype_counts_only_where_it_is_asked(model):
    before, exact = fingerprint(model), fingerprint(model, exact=True)
    assert set(before) == {"vision", "queries", "text"}
    assert set(fingerprint(model, ["text"])) == {"text"}
    for dtype in (torch.float64, torch.bfloat16):
        other = copy.deepcopy(model).to(dtype)
        assert fingerprint(other) == before
        assert all(fingerprint(other, exact=True)[part] != exact[part] for part in exact)
    other = fingerprint(tiny_engine(1).model)
    assert all(other[part] != before[part] for part in before)


@pytest.mark.parametrize(
    "shape", [(3200, 12800), (12800, 3200), (32000, 4096), (257, 333), (64, 4096), (96, 4096)]
)
def test_samples_of_large_tensors_are_spread(shape):
    size = shape[0] * shape[1]
    assert size > WHOLE
    starts = torch.arange(RUNS) * _step(torch.empty(shape, device="meta"))
    assert int(starts[-1]) + RUN <= size and int(starts[-1]) > 0.9 * size
    assert len((starts // shape[1]).unique()) > 0.9 * RUNS  # rows
    columns = (starts % shape[1]).sort().values
    assert float(columns.diff().max()) < 5 * shape[1] / RUNS


def test_samples_do_not_depend_on_the_layout():
    values = torch.randn(300, 400)
    (plain,) = _samples(values)
    (strided,) = _samples(values.t().contiguous().t())
    assert torch.equal(plain, strided) and len(plain) == RUNS * RUN
    assert len(_samples(torch.randn(20, 30))[0]) == 600  # small ones are read whole


@pytest.mark.parametrize("shape", [(96, 64), (512, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_of_a_packed_weight_are_those_of_its_values(shape, dtype):
    values = torch.randn(shape).to(dtype)
    if kernels.layout_of(values) is None:
        pytest.skip("this machine has no packed layout for it")
    weight = PackedTensor(kernels.pack(values), values.shape)
    (found,) = _samples(weight)
    assert torch.equal(found, _samples(values)[0])
    assert type(found) is torch.Tensor and _samples(weight, as_held=True)
    places = torch.randint(0, values.numel(), (5, 7))
    assert torch.equal(torch.take(weight, places), torch.take(values, places))


def test_a_quantized_weight_is_what_it_is_made_of(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model.qllama, quantization.Int8WeightOnlyConfig())
    before = fingerprint(model)
    assert fingerprint(model) == before != fingerprint(tiny_engine().model)
