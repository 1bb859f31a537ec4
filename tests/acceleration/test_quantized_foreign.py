"""Quantized weights in models from elsewhere, accelerated and as they are."""

import copy

import pytest
import torch
from foreign_blocks import TOKENS, TOWERS, WIDTH, call, tower
from foreign_decoders import llama
from foreign_towers import composite
from torch import nn

from internvl_engine import accelerate
from internvl_engine.quantization import quantize
from internvl_engine.weights import QuantizedTensor

pytestmark = pytest.mark.filterwarnings("ignore")
STATES = torch.randn(3, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[1, 5, 9, 30, 2, 7, 11], [1, 7, 2, 0, 9, 3, 4]])


def twin(built):
    """A wide model with the values of a quantized one."""
    copied = copy.deepcopy(built)
    for module in copied.modules():
        for name, parameter in list(module._parameters.items()):
            if isinstance(parameter, QuantizedTensor):
                module._parameters[name] = nn.Parameter(parameter.dense())
    return copied


def near(found, expected):
    """Activations of 8 bits are half a percent off in every product."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert (found - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_towers(name):
    built = tower(name)
    state = copy.deepcopy(built.state_dict())
    report = accelerate(built, quantize="int8", strict=True)
    forms = {entry.name: entry.form for entry in report.weights}
    matrices = [n for n, p in built.named_parameters() if p.dim() == 2]
    assert len(matrices) >= 8 and all(forms[n] == "int8" for n in matrices)  # in_proj_weight too
    near(call(name, built, STATES), call(name, twin(built), STATES))
    report.undo(source=state)
    found = built.state_dict()
    assert all(torch.equal(found[n], t) for n, t in state.items())


def test_an_attention_that_is_not_fused_keeps_its_weights():
    """It reads them as values: nn.MultiheadAttention has no product that a form could take over."""
    built = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    x = torch.randn(2, 5, 64)
    report = accelerate(built, quantize="int8")
    forms = {entry.name: (entry.form, entry.reason) for entry in report.weights}
    apart = ("wide", "its attention is not fused")
    assert forms["self_attn.in_proj_weight"] == forms["self_attn.out_proj.weight"] == apart
    assert forms["linear1.weight"][0] == forms["linear2.weight"][0] == "int8"
    with torch.no_grad():
        near(built(x), twin(built)(x))


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3", "Phi3"])
@torch.no_grad()
def test_decoders(kind):
    built = llama(kind, heads=2, pad_token_id=0)
    accelerate(built, quantize="int4")
    assert {p.FORM for p in built.parameters() if isinstance(p, QuantizedTensor)} == {
        "int4", "int8",
    }  # fmt: skip
    expected = twin(built)
    near(built(IDS).logits, expected(IDS).logits)
    cache = built(IDS[:, :4], use_cache=True).past_key_values
    step = built(IDS[:, 4:5], past_key_values=cache).logits[:, 0]
    near(step, built(IDS[:, :5]).logits[:, -1])
    answer = built.generate(IDS, max_new_tokens=3, do_sample=False)
    assert answer.shape == (2, 10) and torch.equal(answer[:, :7], IDS)


@pytest.mark.parametrize("first", [True, False], ids=["tied before", "tied after"])
@torch.no_grad()
def test_a_tied_head_is_one_weight(first):
    built = composite(tie=True)
    if first:
        built.tie_weights()
    quantize(built, "int8")
    if not first:
        built.tie_weights()
    head, table = built.get_output_embeddings().weight, built.get_input_embeddings().weight
    assert head is table and isinstance(head, QuantizedTensor) and head.FORM == "int8"
    assert torch.equal(built.get_input_embeddings()(IDS), head.dense()[IDS])
    assert built.state_dict()["lm_head.weight"].shape == table.shape


@torch.no_grad()
def test_a_model_that_transformers_saves_is_wide(tmp_path):
    built = composite()
    accelerate(built, quantize="int8")
    built.save_pretrained(tmp_path)
    again = type(built).from_pretrained(tmp_path).eval()
    state = built.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in again.state_dict().items())
    assert not any(isinstance(p, QuantizedTensor) for p in again.parameters())
