"""Accelerated models whose weights or modules somebody holds, shares, copies or patches."""

import copy
import weakref

import pytest
import torch
from company import eager, gradients, run
from torch import nn

from internvl_engine import accelerate
from internvl_engine.weights import WeightTensor


def close(found, expected):
    # Two orders of sums in float32.
    assert (found - expected).norm() <= 1e-5 * expected.norm()


HOLDERS = {
    "a graph": lambda built: run(built),
    "weak references": lambda built: [weakref.ref(p) for p in built.parameters()],
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_casts_and_undo_reach_weights_that_are_held(holder):
    expected = run(eager("chat").double())
    for undone in (False, True):
        built = eager("chat")
        report = accelerate(built)
        held = HOLDERS[holder](built)
        if undone:
            report.undo()
        assert undone <= (not any(isinstance(p, WeightTensor) for p in built.parameters()))
        built.to(torch.float64)
        assert {p.dtype for p in built.parameters()} == {torch.float64} and held is not None
        # The float32 weights, in float64 arithmetic.
        assert (run(built) - expected).norm() <= 1e-6 * expected.norm()


def test_hooks_on_the_nodes_that_accumulate_gradients_are_called():
    counts = []
    for accelerated in (False, True):
        built, calls, nodes = eager("chat").train(), [], []
        if accelerated:
            accelerate(built)
        for parameter in built.parameters():  # as ZeRO and FSDP do
            nodes.append(parameter.view_as(parameter).grad_fn.next_functions[0][0])
            nodes[-1].register_hook(lambda *_, calls=calls: calls.append(1))
        built.eval()
        gradients(built.train())
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


def test_it_is_evaluated_in_inference_mode_and_trained_after():
    built, expected = eager("chat").train(), gradients(eager("chat").train())
    accelerate(built)
    with torch.inference_mode():
        run(built.eval())
        built.train()
    found = gradients(built)
    assert found.keys() == expected.keys()
    scale = torch.stack([g.norm() for g in expected.values()]).norm()
    assert all((found[n] - expected[n]).norm() <= 1e-5 * scale for n in expected)


@torch.no_grad()
def test_it_can_be_shared_between_processes():
    built = eager("chat")
    expected = run(built)
    accelerate(built)
    built.share_memory()
    assert all(parameter.is_shared() for parameter in built.parameters())
    close(run(built), expected)


@torch.no_grad()
def test_a_shallow_copy_computes_with_its_own_linears():
    built = eager("chat")
    accelerate(built)
    mlp = built.model.language_model.layers[0].mlp
    other = copy.copy(mlp)  # as nn.DataParallel makes replicas
    other._modules = dict(mlp._modules)
    other.down_proj = nn.Linear(mlp.down_proj.in_features, 7)
    x = torch.randn(2, 5, mlp.gate_proj.in_features)
    assert other(x).shape == (2, 5, 7) and mlp(x).shape == x.shape


def test_it_is_freed_without_the_garbage_collector():
    built = eager("chat")
    accelerate(built)
    linear = weakref.ref(built.model.language_model.layers[0].mlp.down_proj)
    del built
    assert linear() is None


@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_a_forward_that_its_class_is_given_is_what_computes(when, monkeypatch):
    built = eager("chat")
    kind = type(built.model.language_model.layers[0].mlp)
    if when == "after":
        accelerate(built)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x) * 2)
    expected = run(eager("chat"))
    if when == "before":
        assert "computes something else" in str(accelerate(built))
    close(run(built), expected)


@torch.no_grad()
def test_a_part_that_is_gone_stops_nobody():
    built = eager("chat")
    report = accelerate(built)
    built.model.language_model.layers[0].mlp = nn.Identity()
    layer = next(m for m in built.modules() if type(m).__name__ == "InternVLVisionLayer")
    layer.mlp = nn.Identity()
    expected = run(built.eval())
    built.train().eval()
    report.undo()
    close(run(built), expected)


def test_an_error_on_the_way_leaves_the_model_eager(monkeypatch):
    from internvl_engine.weights import Linears

    built, calls, prepare = eager("chat"), [], Linears.prepare

    def failing(self, owner):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        prepare(self, owner)

    kinds = [type(m) for m in built.modules()]
    monkeypatch.setattr(Linears, "prepare", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        accelerate(built)
    assert [type(p) for p in built.parameters()] == [nn.Parameter] * len(list(built.parameters()))
    assert [type(m) for m in built.modules()] == kinds
