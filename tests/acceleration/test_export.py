"""torch.export, torch.compile and ONNX of accelerated models."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from company import KINDS, call, close, eager, run, spread, tensor
from foreign_decoders import llama
from foreign_towers import composite, vision_tower
from torch import nn

from internvl_engine import accelerate

from models import VISION, decoder, model, pixels

pytestmark = pytest.mark.filterwarnings("ignore")
MODES = ("inference", "training")


class Tower(nn.Module):
    """The part of a model that takes pictures, one tensor to one tensor."""

    def __init__(self, kind, built):
        super().__init__()
        self.kind = kind
        self.tower = built.model.vision_tower if kind == "chat" else built.vision_model

    def forward(self, x):
        if self.kind == "published":
            return self.tower(pixel_embeds=x).last_hidden_state
        return self.tower(x).last_hidden_state


def tower(kind, dtype=torch.float32):
    """It, and a batch for it."""
    built = Tower(kind, eager(kind, dtype)).eval()
    shape = (2, 17, 48) if kind == "published" else (2, 3, 28, 28)
    return built, torch.randn(shape).to(dtype)


def changed(state):
    """What `accelerate` and after it `undo()` make of a model."""

    def change(built):
        report = accelerate(built, "training" if state == "training" else "inference")
        if state == "undo":
            report.undo()
        return built

    return change


@pytest.mark.parametrize("state", [*MODES, "undo"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_exported_towers_compute_the_same(kind, state, tmp_path):
    built, x = tower(kind)
    expected = built(x)
    changed(state)(built)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(built, (x,), dynamic_shapes=({0: batch},))
    close(program.module()(x), expected)
    torch.export.save(program, tmp_path / "tower.pt2")
    again = torch.export.load(tmp_path / "tower.pt2").module()
    close(again(x), expected)
    close(again(torch.cat((x, x)))[2:], expected)
    close(built(x), expected)
    weights = program.state_dict
    assert weights.keys() == built.state_dict().keys()
    assert all(torch.equal(t + 0, weights[name] + 0) for name, t in built.state_dict().items())


def test_what_is_exported_without_gradients_is_called_with_them():
    built, x = tower("ours")
    expected = built(x).detach()
    accelerate(built)
    with torch.no_grad():
        program = torch.export.export(built, (x,))
    close(program.module()(x).detach(), expected)


LOAD = """
import sys, torch, internvl_engine.kernels
program = torch.export.load(sys.argv[1])
x, expected = torch.load(sys.argv[2])
with torch.no_grad():
    found = program.module()(x)
assert (found - expected).norm() <= 1e-4 * expected.norm(), float((found - expected).norm())
"""


def test_a_saved_export_is_right_under_other_instructions(tmp_path):
    built, x = tower("ours")
    accelerate(built)
    with torch.no_grad():
        expected = built(x)
        torch.export.save(torch.export.export(built, (x,)), tmp_path / "tower.pt2")
    torch.save((x, expected), tmp_path / "pair.pt")
    arguments = [sys.executable, "-c", LOAD, tmp_path / "tower.pt2", tmp_path / "pair.pt"]
    subprocess.run(arguments, check=True, env={**os.environ, "INTERNVL_ISA": "portable"})


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_traced_towers_compute_the_same(kind):
    built, x = tower(kind)
    expected = built(x)
    accelerate(built)
    close(torch.jit.trace(built, x, check_trace=False)(x), expected)


@pytest.mark.parametrize("kind", ["ours", "chat"])
@torch.no_grad()
def test_onnx_takes_the_eager_path(kind, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    built, x = tower(kind)
    before = copy.deepcopy(built.state_dict())
    expected = built(x)
    report = accelerate(built)
    torch.onnx.export(built, (x,), tmp_path / "tower.onnx", dynamo=True, verbose=False)
    graph = onnx.load(tmp_path / "tower.onnx").graph
    assert not [node.op_type for node in graph.node if "internvl" in node.domain]
    assert {"MatMul", "Softmax", "Erf"} & {node.op_type for node in graph.node}
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
    (found,) = evaluator(str(tmp_path / "tower.onnx")).run(None, {graph.input[0].name: x.numpy()})
    close(torch.from_numpy(found), expected)
    assert report.replaced
    close(built(x), expected)
    assert all(torch.equal(t, before[name]) for name, t in built.state_dict().items())


DEEP = {"num_hidden_layers": 9}  # PyTorch compiles one code object eight times


def many_layers():
    return {
        "ours": (
            model(vision_config=VISION | DEEP).vision_model,
            pixels(2),
        ),
        "chat": (spread(vision_tower(**DEEP)), torch.randn(2, 3, 28, 28)),
        "qllama": (decoder(**DEEP), torch.tensor([[1, 5, 9], [1, 7, 2]])),
        "llm": (llama("Qwen2", heads=2, **DEEP), torch.tensor([[1, 5, 9]])),
    }


@pytest.mark.parametrize("kind", ["ours", "chat", "qllama", "llm"])
@torch.no_grad()
def test_more_layers_than_may_be_recompiled(kind, monkeypatch):
    """Every layer has another index, and all of them one code object."""
    built, x = many_layers()[kind]

    def outputs():
        output = built(x)
        return output.logits if hasattr(output, "logits") else output.last_hidden_state

    expected, compiled = outputs(), []
    original = torch.compile

    def compile_eagerly(function, **kwargs):  # Inductor takes a minute and proves nothing here
        compiled.append(function)
        return original(function, **{**kwargs, "backend": "eager"})

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    torch._dynamo.reset()
    report = accelerate(built, compile=True)
    assert len(compiled) >= 9
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(2):
            close(outputs(), expected)
    report.undo()
    close(outputs(), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("states", [False, True])
@torch.no_grad()
def test_compiled_layers_of_the_composite(states, monkeypatch):
    """transformers 5 leaves recording hooks on its layers once it was asked for their states."""
    built = spread(composite())
    args, kwargs = call(built)
    if states:
        built(*args, **kwargs, output_hidden_states=True)
    expected = built(*args, **kwargs).logits
    original = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, **kwargs: original(function, **{**kwargs, "backend": "eager"}),
    )
    torch._dynamo.reset()
    accelerate(built, compile=True)
    close(tensor(built(*args, **kwargs)), expected)
    found = built(*args, **kwargs, output_hidden_states=True)
    close(found.logits, expected)
    assert len(found.hidden_states) == 2 + 1
    torch._dynamo.reset()


@torch.no_grad()
def test_a_whole_accelerated_model_is_compiled():
    built = eager("chat")
    expected = run(built)
    accelerate(built)
    torch._dynamo.reset()
    args, kwargs = call(built)
    close(tensor(torch.compile(built, backend="eager")(*args, **kwargs)), expected)
    close(run(built), expected)
    torch._dynamo.reset()


def test_a_compiled_tower_trains():
    gradients = []
    x = tower("chat")[1]
    for accelerated in (False, True):
        built, _ = tower("chat")
        if accelerated:
            accelerate(built.train(), "training")
        torch._dynamo.reset()
        torch.compile(built, backend="aot_eager")(x).square().mean().backward()
        named = built.named_parameters()
        gradients.append({name: p.grad for name, p in named if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    scale = torch.stack([grad.norm() for grad in gradients[0].values()]).norm()
    for name, grad in gradients[0].items():
        assert (gradients[1][name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * scale, name
    torch._dynamo.reset()
