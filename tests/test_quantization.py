"""`quantize`: which weights get which form, what the model is then, and all of it back."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from company import KINDS, eager, run
from torch import nn

from internvl_engine import VisionLanguageModel, accelerate, kernels
from internvl_engine.embedding.fingerprint import fingerprint
from internvl_engine.modeling import InternVL_G
from internvl_engine.quantization import (
    Rule,
    Scheme,
    quantize,
    quantized_state_dict,
    slower_reason,
)
from internvl_engine.weights import Int4Tensor, Int8Tensor, QuantizedTensor

from chat_goldens import CHAT
from models import VISION, model, pixels

pytestmark = pytest.mark.filterwarnings("ignore")
SCHEMES = ("int8", "int4", "fp8")
PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[1, 5, 9, 30, 2], [1, 7, 2, 0, 0]])


def quantized(built, scheme="int8"):
    """In any form here: fp8 would stay wide on a processor."""
    return quantize(built, scheme, only_faster=False)


def held(built):
    return {name: p for name, p in built.named_parameters() if isinstance(p, QuantizedTensor)}


def twin(built):
    """A wide model with the values of a quantized one."""
    copied = copy.deepcopy(built)
    for module in copied.modules():
        for name, parameter in list(module._parameters.items()):
            if isinstance(parameter, QuantizedTensor):
                module._parameters[name] = nn.Parameter(parameter.dense())
    return copied


def near(found, expected, tolerance=0.05):
    """Activations of 8 bits are half a percent off in every product; five layers follow."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert (found - expected).float().norm() <= tolerance * expected.float().norm()


def embedded(built):
    """Embeddings, where what the model returns are the differences of a few of them."""
    if not hasattr(built, "encode_image"):
        return run(built)
    images = PIXELS.to(next(built.parameters()).dtype)
    return torch.cat((built.encode_image(images, "InternVL-G"), built.encode_text(IDS)), 1)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_model_computes_with_the_values_of_its_forms(kind, scheme):
    built = eager(kind)
    before = dict(built.named_parameters())
    counts = {name: p.numel() for name, p in before.items()}
    report = quantized(built, scheme)
    expected = embedded(twin(built))
    near(embedded(built), expected)
    accelerate(built, strict=True)
    near(embedded(built), expected)
    assert list(dict(built.named_parameters())) == list(before)
    assert all(p is before[name] for name, p in built.named_parameters())
    assert {name: p.numel() for name, p in built.named_parameters()} == counts
    forms = {entry.name: entry.form for entry in report.weights}
    assert {n for n, form in forms.items() if form != "wide"} == set(held(built))
    assert all(forms[name] == p.FORM for name, p in held(built).items())
    assert report.bytes_after == sum(p.nbytes for p in built.parameters())
    assert report.bytes_after < 0.45 * report.bytes_before


def test_the_report_says_what_and_why():
    built = eager("ours")
    text = str(accelerate(built, quantize="int4"))
    assert "quantize: int4, 0.85 MB of weights became 0.27 MB" in text
    assert "29 x int4, 0.53 MB to 0.07 MB" in text and "10 x int8, 0.18 MB to 0.06 MB" in text
    assert "6 x wide, 0.08 MB: the scheme keeps it wide" in text
    assert "3 x wide, 0.01 MB: it is small" in text
    assert "it is not the weight of a Linear or an embedding" in text
    again = accelerate(built, quantize="int8")
    assert {e.reason for e in again.weights if e.form == "int4"} == {"already quantized"}
    assert "quantized already: 10 x int8, 29 x int4" in str(accelerate(built))


@pytest.mark.parametrize("first", [True, False], ids=["quantized first", "accelerated first"])
@torch.no_grad()
def test_neighbours_are_one_product_before_and_after_accelerate(first):
    built = eager("ours")
    accelerate(built, quantize="int8")
    expected = run(built)
    other = eager("ours")
    reports = [quantize(other, "int8"), accelerate(other)] if first else [
        accelerate(other), quantize(other, "int8")]  # fmt: skip
    assert torch.equal(run(other), expected)
    attention = other.qllama.model.layers[0]
    weights = [getattr(attention.self_attn, f"{x}_proj").weight for x in "qkv"]
    places = [weight.packed.data_ptr() for weight in weights]
    assert places[1] - places[0] == places[2] - places[1] == weights[0].packed.nbytes
    for report in reports:
        report.undo()


@torch.no_grad()
def test_training_and_evaluation_dtypes_and_copies_keep_the_form():
    built = eager("ours")
    accelerate(built, quantize="int4")
    expected, forms = embedded(built), {n: type(p) for n, p in held(built).items()}
    built.train()
    near(embedded(built), expected, 1e-4)  # products apart, of the same bits
    assert torch.equal(embedded(built.eval()), expected)
    for copied in (copy.deepcopy(built), pickle.loads(pickle.dumps(built))):
        assert {n: type(p) for n, p in held(copied).items()} == forms
        assert torch.equal(embedded(copied), expected)
    built.to(torch.bfloat16)
    assert {n: type(p) for n, p in held(built).items()} == forms
    assert all(p.dtype == torch.bfloat16 for p in built.parameters())
    near(embedded(built).float(), expected, 0.2)
    near(embedded(built.float()), expected)  # other parameters were rounded to bfloat16


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_state_dicts_are_wide_or_quantized(kind):
    built = eager(kind)
    accelerate(built, quantize="int4")
    expected, state = embedded(built), built.state_dict()
    other = eager(kind)
    assert other.state_dict().keys() == state.keys()
    other.load_state_dict(state)
    near(expected, embedded(other))
    bits = quantized_state_dict(built)
    name = next(iter(held(built)))
    assert bits[name].dtype in (torch.int8, torch.uint8) and f"{name}.scales" in bits
    assert all(type(tensor) is torch.Tensor for tensor in bits.values())
    fresh = eager(kind)
    accelerate(fresh, quantize="int4")
    for parameter in fresh.parameters():
        parameter.zero_()
    fresh.load_state_dict(bits)
    assert torch.equal(embedded(fresh), expected)
    wide = eager(kind).state_dict()
    fresh.load_state_dict(wide)  # rounds the same values to the same bits
    assert torch.equal(embedded(fresh), expected)


@torch.no_grad()
def test_undo_reads_the_bits_from_the_checkpoint(tmp_path, recwarn):
    model().to(torch.bfloat16).save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float32):
        built = InternVL_G.from_pretrained(tmp_path, dtype=dtype)
        state = copy.deepcopy(built.state_dict())
        modules = {name: type(module) for name, module in built.named_modules()}
        flags = [p.requires_grad for p in built.parameters()]
        report = accelerate(built, quantize="int4")
        built.encode_image(pixels(1).to(dtype))
        report.undo()
        assert not [str(w.message) for w in recwarn if "undo" in str(w.message)]
        assert all(torch.equal(t, state[name]) for name, t in built.state_dict().items())
        assert all(type(p) is nn.Parameter for p in built.parameters())
        assert [p.requires_grad for p in built.parameters()] == flags
        assert {name: type(module) for name, module in built.named_modules()} == modules
        assert not any(module._state_dict_hooks for module in built.modules())


@torch.no_grad()
def test_undo_of_a_chat_model_reads_its_folder():
    folder = CHAT / "qwen3_300m_tied"
    built = VisionLanguageModel.from_pretrained(folder, dtype=torch.float32)
    state = copy.deepcopy(built.state_dict())
    report = accelerate(built, quantize="int8")
    head = built.language_model.get_output_embeddings().weight
    assert head is built.language_model.get_input_embeddings().weight
    assert isinstance(head, Int8Tensor)
    report.undo()
    assert head is built.language_model.get_output_embeddings().weight
    assert head is built.language_model.get_input_embeddings().weight
    assert all(torch.equal(t, state[name]) for name, t in built.state_dict().items())


@torch.no_grad()
def test_undo_without_the_source_has_the_values_of_the_forms_and_says_so(tmp_path):
    built = eager("ours")
    wide = copy.deepcopy(built.state_dict())
    report = accelerate(built, quantize="int8")
    values = built.state_dict()
    with pytest.warns(UserWarning, match=r"undo: \d+ weights .* rounded values now"):
        report.undo()
    assert all(torch.equal(t, values[name]) for name, t in built.state_dict().items())
    built.load_state_dict(wide)
    report = accelerate(built, quantize="int8")
    report.undo(source=wide)
    assert all(torch.equal(t, wide[name]) for name, t in built.state_dict().items())


@torch.no_grad()
def test_undo_takes_no_weight_that_was_another_when_it_was_quantized(tmp_path):
    """As after training, or after an adapter was merged."""
    model().save_pretrained(tmp_path)
    built = InternVL_G.from_pretrained(tmp_path, dtype=torch.float32)
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    changed = built.get_parameter(name)
    changed[3, 5] += 1
    expected = Int8Tensor.quantize(changed).dense()
    report = accelerate(built, quantize="int8")
    with pytest.warns(UserWarning, match=rf"undo: 1 weights \({name}"):
        report.undo()
    assert torch.equal(built.get_parameter(name), expected)


class Odd(nn.Module):
    """Modules that nobody knows: a tied table, linears, a subclass, a renormed table."""

    class Special(nn.Linear):
        def forward(self, x):
            return x @ self.weight.t()

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(64, 48), nn.Linear(48, 64, bias=False)
        self.head.weight = self.table.weight
        self.first, self.special = nn.Linear(48, 48), self.Special(48, 48)
        self.renormed = nn.Embedding(64, 48, max_norm=1.0)
        self.tiny = nn.Linear(48, 2)

    def forward(self, ids):
        states = F.gelu(self.first(self.table(ids) + self.renormed(ids)))
        return self.head(self.special(states)), self.tiny(states)


@torch.no_grad()
def test_linears_in_unknown_modules_are_quantized_too():
    built, ids = Odd().eval(), torch.randint(0, 64, (2, 5))
    report = accelerate(built, quantize="int8")
    assert set(held(built)) == {"table.weight", "first.weight"}
    assert built.head.weight is built.table.weight
    assert report.quantization.wide == {
        "first.bias": "it is not the weight of a Linear or an embedding",
        "special.weight": "it is not the weight of a Linear or an embedding",
        "special.bias": "it is not the weight of a Linear or an embedding",
        "renormed.weight": "its table is renormed as it is read",
        "tiny.weight": "it is small",
        "tiny.bias": "it is not the weight of a Linear or an embedding",
    }
    expected = twin(built)
    for found, theirs in zip(built(ids), expected(ids), strict=True):
        near(found, theirs)
    assert torch.equal(built.table(ids), expected.table(ids))
    assert "no module of this model is known" not in str(report)


def test_a_scheme_of_ones_own_and_forms_that_are_slower():
    built = Odd()
    scheme = Scheme("mine", (Rule("table", "int8"), Rule("first", "int4", group=128)))
    quantize(built, scheme)
    assert isinstance(built.first.weight, Int4Tensor) and built.first.weight.options == {
        "group": 64
    }  # one group of 48 columns is one of either size
    built = Odd()
    report = quantize(built, "fp8")
    assert not held(built) and "fp8 is slower on cpu" in str(report)
    with pytest.warns(
        UserWarning, match="with quantize='fp8' every weight stays wide here: fp8 is"
    ):
        accelerate(built, quantize="fp8")
    assert slower_reason("fp8", torch.device("cpu"))
    assert "widened at every call" in slower_reason("int8", torch.device("mps"))
    if "native" in kernels.backends("linear_int8")["CPU"]:
        assert slower_reason("int8", torch.device("cpu")) is None
        with kernels.prefer("linear_int8", "reference"):
            assert "int8 is slower on cpu" in str(quantize(Odd(), "int8"))
    with pytest.raises(ValueError, match="quantize must be one of int8, int4, fp8 or a Scheme"):
        accelerate(built, quantize="int2")


def test_what_cannot_be_quantized_leaves_the_model_as_it_was():
    built = Odd()
    with torch.no_grad():
        built.first.weight[0, 0] = torch.nan
    before = {name: type(p) for name, p in built.named_parameters()}
    with pytest.raises(ValueError, match="NaN or infinite"):
        accelerate(built, quantize="int8")
    assert {name: type(p) for name, p in built.named_parameters()} == before


def test_adapters_train_on_a_quantized_base():
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "fc1", "down_proj"]
    results = []
    built = eager("chat")
    accelerate(built, quantize="int8", mode="training")
    for one in (twin(eager_like(built)), built):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        one = peft.get_peft_model(one, config).train()
        trained = {n: p for n, p in one.named_parameters() if p.requires_grad}
        assert trained and all("lora_" in name for name in trained)
        run(one).float().square().mean().backward()
        results.append(torch.cat([p.grad.flatten() for p in trained.values()]))
        bits = {n: p.dense() for n, p in held(one).items()}
        torch.optim.SGD(trained.values(), lr=0.1).step()
        assert all(torch.equal(p.dense(), bits[n]) for n, p in held(one).items())
    near(results[1], results[0], 0.1)


def eager_like(built):
    """An eager model of the same values and forms."""
    other = eager("chat")
    quantize(other, "int8")
    return other


@torch.no_grad()
def test_what_is_saved_is_wide(tmp_path):
    built = model().to(torch.bfloat16)
    accelerate(built, quantize="int8")
    built.save_pretrained(tmp_path)
    again = InternVL_G.from_pretrained(tmp_path, dtype=torch.bfloat16)
    state = built.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in again.state_dict().items())
    near(again.encode_text(IDS).float(), built.encode_text(IDS).float(), 0.1)


@pytest.mark.parametrize("exact", [True, False])
def test_embeddings_of_quantized_weights_are_known_to_be_others(exact):
    """Tables of 128 rows and more are sampled, row by row of the form."""
    found = []
    for scheme in (None, *SCHEMES):
        built = model(vision_config=VISION | {"intermediate_size": 1200})
        if scheme is not None:
            quantized(built, scheme)
        found.append(fingerprint(built, exact=exact))
        assert fingerprint(copy.deepcopy(built), exact=exact) == found[-1]
    assert len({marks["text"] for marks in found}) == 4
