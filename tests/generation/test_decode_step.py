"""The step with norms absorbed in its products: what the ordinary one computes."""

import sys

import pytest
import torch
from host_gpu import host_gpu, needs_compiler

from internvl_engine import accelerate
from internvl_engine.fused import decode_step
from internvl_engine.generation import step
from internvl_engine.generation.storage import Storage
from internvl_engine.kernels import _library

from models import model

IDS = torch.tensor([[7], [20], [9]])
POSITIONS = torch.tensor([5, 0, 8])
OPERATORS = ("decode_qkv", "norm_linear", "linear_squares")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def logits(built) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one step of three rows, and the storage that it wrote to."""
    decoder = built.language_model
    config = decoder.config
    dim = config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(3)
    like = torch.randn(1, config.num_attention_heads, 1, dim).to(built.dtype)
    storage = Storage(like, config.num_hidden_layers, 3, 16)
    drawn = torch.randn(storage.tensor.shape, generator=generator)
    storage.tensor.copy_(drawn)
    return step.step_of(decoder, storage.tensor)(IDS, POSITIONS), storage.tensor


def absorbed(built, monkeypatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The same through decode_step.py, whatever device this is."""
    calls, run = [], decode_step.step
    monkeypatch.setattr(decode_step, "is_preferred", lambda hidden: True)
    monkeypatch.setattr(decode_step, "step", lambda *args: calls.append(1) or run(*args))
    found = logits(built)
    assert calls == [1]
    return found


@pytest.mark.parametrize("form", ["int8", "int4", "plain"])
def test_is_the_ordinary_step(form, monkeypatch):
    built = model().double() if form == "plain" else model()  # nothing packs float64
    accelerate(built, quantize=None if form == "plain" else form)
    expected, found = logits(built), absorbed(built, monkeypatch)
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.parametrize("form", [None, "int8"])
def test_on_the_cuda_kernels(form, monkeypatch):
    """Of float16, which no CPU kernel packs, with "cuda" in front of the other backends."""
    built = model().half()
    accelerate(built, quantize=form)
    wide = model().float()
    wide.load_state_dict({name: value.float() for name, value in built.state_dict().items()})
    for operator in OPERATORS:
        module = sys.modules[f"internvl_engine.kernels.{operator}"]
        order = _library._ORDER[operator]["CPU"]  # the list that the operator asks
        order.insert(0, ("cuda", getattr(module, f"{operator}_cuda")))
    try:
        with host_gpu() as gpu:
            found = absorbed(built, monkeypatch)
    finally:
        for operator in OPERATORS:
            del _library._ORDER[operator]["CPU"][0]
    each = 4 if form is None else 3  # heads of 16 do not fill the panels of int8
    assert gpu.calls == each * built.language_model.config.num_hidden_layers
    monkeypatch.undo()
    expected = logits(wide)
    for ours, wanted in zip(found, expected, strict=True):
        # Of int8 the CPU computes q, k, v and the head, and rounds what it multiplies.
        limit = 1e-2 if form is None else 3e-2
        assert (ours.float() - wanted).norm() / wanted.norm() < limit


def test_is_taken_where_it_is_asked_for_and_only_by_a_step(monkeypatch):
    built = model()
    accelerate(built, quantize="int8")
    monkeypatch.setattr(decode_step, "step", lambda *args: pytest.fail("nobody asked for it"))
    logits(built)
    assert not decode_step.is_preferred(torch.zeros(1, 1, 8))
    monkeypatch.setattr(decode_step, "is_preferred", lambda hidden: True)
    prompt = torch.ones(2, 5, dtype=torch.int64)
    built.language_model(input_ids=prompt)  # no cache, several tokens
