"""The fidelity of schemes: what is measured, and that the embedded models lose nothing."""

import json

import pytest
import torch
from torch import nn

from internvl_engine.schemes import Rule, Scheme
from internvl_engine.verification.fidelity import fidelity
from internvl_engine.verification.real_width import embeddings_at_real_width
from internvl_engine.weights import QuantizedTensor

TINY = {
    "vision_config": {
        "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4, "image_size": 28,
        "intermediate_size": 96, "patch_size": 7,
    },
    "qllama_config": {
        "num_hidden_layers": 1, "vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4,
        "intermediate_size": 96,
    },
    "clip_embed_dim": 32, "num_query_token": 6,
}  # fmt: skip


@pytest.mark.parametrize("model, measures", [("nano", 6), ("nano-chat", 3)])
def test_the_embedded_models_lose_nothing(model, measures):
    schemes = ("int8", "int4", "fp8")
    rows = list(fidelity(schemes, [model], count=24))
    assert [row.scheme for row in rows] == [name for name in schemes for _ in range(measures)]
    for row in rows:  # one of 24 may tip over on a machine with other kernels
        assert row.value >= row.wide - 0.042 and row.wide > 0.9, row
        assert row.agreement >= 0.95, row
    parts = {row.scheme: row.bytes_part for row in rows}
    assert parts["int4"] < parts["int8"] < 0.75 and parts["fp8"] < 0.75


def test_a_scheme_that_destroys_the_model_is_seen(monkeypatch):
    from internvl_engine.weights import Int4Tensor

    rounded = Int4Tensor._quantize.__func__
    monkeypatch.setattr(
        Int4Tensor, "_quantize", classmethod(lambda cls, w, **o: rounded(cls, w.flip(0), **o))
    )
    rows = list(fidelity([Scheme("bad", (Rule("fc1|fc2", "int4"),))], ["nano"], count=24))
    assert all(row.scheme == "bad" and row.agreement < 0.7 for row in rows if "C" in row.measure)


@torch.no_grad()
def test_the_layers_of_real_width_have_outliers_and_repeat():
    seen = []

    def prepare(model: nn.Module) -> nn.Module:
        assert not any(p.requires_grad for p in model.parameters())
        seen.append(model)
        return model

    first = embeddings_at_real_width(prepare, **TINY)
    assert all(
        torch.equal(x, first[k]) for k, x in embeddings_at_real_width(prepare, **TINY).items()
    )
    assert {k: tuple(x.shape) for k, x in first.items()} == {
        "C": (4, 32), "G": (4, 32), "text": (56, 64),
    }  # fmt: skip
    assert all(x.isfinite().all() for x in first.values())
    embeddings = seen[0].vision_model.embeddings
    states = embeddings(torch.randn(1, 3, 28, 28))
    sizes = states.abs().mean((0, 1)).sort(descending=True).values
    assert (sizes[:4] > 900).all() and (sizes[4:] < 20).all()
    assert not any(isinstance(p, QuantizedTensor) for p in seen[0].parameters())


def test_unknown_models_and_schemes_are_refused():
    with pytest.raises(ValueError, match="models are nano, nano-chat, real width, got 14b"):
        next(fidelity(["int8"], ["14b"]))
    with pytest.raises(ValueError, match="quantize must be one of"):
        next(fidelity(["int3"], ["nano"]))


def test_the_command_prints_the_rows(capsys):
    from internvl_engine.cli import main

    arguments = ["bench", "fidelity", "nano", "--quantize", "int8", "--count", "4"]
    with pytest.raises(SystemExit):
        main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["model", "measure", "scheme"] and len(lines) == 7
    with pytest.raises(SystemExit):
        main([*arguments, "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 6 and {row["scheme"] for row in rows} == {"int8"}
    assert all(row["value"] == 1.0 for row in rows)
