"""Accelerated towers under torch.compile: one graph, and one for every batch size."""

from functools import partial

import pytest
import torch
from foreign_decoders import llama, published
from torch._dynamo.testing import CompileCounter

from internvl_engine import accelerate

from models import VISION, model, pixels

IDS = torch.tensor([[1, 5, 9, 30, 2]])
TOWERS = {
    "vision": (lambda one, x: one.vision_model(x).last_hidden_state, pixels),
    "queries": (lambda one, x: one.get_image_features(x)[1], pixels),
    "text": (lambda one, ids: one.get_text_features(ids, ids > 0), lambda b: IDS.repeat(b, 1)),
    "pooler": (lambda one, x: one.clip_projector(x), lambda b: torch.randn(b, 17, 48)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tower", TOWERS)
@torch.no_grad()
def test_one_graph_serves_every_batch(tower, dtype):
    run, inputs = TOWERS[tower]
    built = model().to(dtype)
    accelerate(built)

    def case(batch):
        x = inputs(batch)
        return x.to(dtype) if x.is_floating_point() else x

    run(built, case(2))  # fills the rotary tables, which a graph would have to grow
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(lambda x: run(built, x), fullgraph=True, dynamic=True, backend=graphs)
    for batch in (2, 3, 5):
        x = case(batch)
        expected = run(built, x)
        tolerance = 1e-5 if dtype == torch.float32 else 4e-2  # as in test_acceleration.py
        assert (compiled(x) - expected).norm() <= tolerance * expected.norm()
    assert graphs.frame_count == 1


@pytest.mark.parametrize("build", [published, llama, partial(llama, "Qwen3", heads=2)])
@torch.no_grad()
def test_one_graph_serves_every_batch_and_length_of_foreign_layers(build):
    built = build()
    accelerate(built)
    layer = built.model.layers[0]

    def case(batch, tokens):
        positions, x = torch.arange(tokens)[None], torch.randn(batch, tokens, 64)
        if not hasattr(built.model, "rotary_emb"):
            mask = built.model.mask(torch.ones(batch, tokens), tokens, x.dtype, True)
            return (x, torch.randn(batch, 9, 48)), {
                "attention_mask": mask,
                "position_ids": positions,
            }
        tables = built.model.rotary_emb(x, positions)
        return (x,), {"attention_mask": None, "position_embeddings": tables}

    graphs = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=graphs)
    for batch, tokens in ((2, 7), (3, 9), (5, 8)):
        args, kwargs = case(batch, tokens)
        found, expected = (one(*args, **kwargs) for one in (compiled, layer))
        if isinstance(expected, tuple):
            found, expected = found[0], expected[0]
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert graphs.frame_count == 1


def test_layers_can_be_compiled_as_they_are_fused(monkeypatch):
    tower = model(vision_config=VISION | {"num_hidden_layers": 1}).vision_model  # Inductor is slow
    calls, original, x = [], torch.compile, pixels(2)

    def counted(function, **options):
        compiled = original(function, **options)
        return lambda *args: calls.append(function) or compiled(*args)

    monkeypatch.setattr(torch, "compile", counted)
    with torch.no_grad():
        expected = tower(x).last_hidden_state
        report = accelerate(tower, compile=True)
        assert (tower(x).last_hidden_state - expected).norm() <= 1e-5 * expected.norm()
        assert len(calls) == 1
        report.undo()
        assert torch.equal(tower(x).last_hidden_state, expected)
        assert len(calls) == 1
