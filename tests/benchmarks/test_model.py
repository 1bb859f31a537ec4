"""`internvl bench model`: every part at the smallest size computes the same and counts right."""

import pytest
import torch
from benchmark_cases import SHORT

from internvl_engine.benchmarks import full_size, loading, model, report, timing


@pytest.fixture(scope="module")
def forms():
    return model.Forms(model.built("nano", torch.float32, "cpu"), ("int8",))


@torch.no_grad()
def test_images_are_timed_by_their_number_and_size(forms):
    side = forms.eager.config.image_size
    some = list(model.encode(forms, (1, 3), compiles=False, resolutions=(42,)))
    assert [(c.operator, c.images, c.varies) for c in some] == [
        ("encode_c", 1, ("images", 1)), ("encode_c", 3, ("images", 3)),
        ("encode_g", 1, ("images", 1)), ("encode_g", 3, ("images", 3)),
        ("resolution", 1, ("pixels a side", side)), ("resolution", 1, ("pixels a side", 42)),
    ]  # fmt: skip
    assert all(set(c.providers) == {"ours, float32", "ours, int8", "eager"} for c in some)
    assert not timing.failures(some[5])  # the tables of positions have its size by now
    for each in (forms.eager, *forms.models.values()):
        each.vision_model.resize_pos_embeddings(42, side, each.config.vision_config.patch_size)
    for case in some[:5]:
        assert not timing.failures(case)
    assert some[1].flops == 3 * some[0].flops
    assert some[2].bytes > some[0].bytes  # QLLaMA's weights are read too


@torch.no_grad()
def test_texts_are_timed_by_their_length(forms):
    short, long = model.texts(forms, 2, (4, 9))
    assert (short.shape, long.shape, long.varies) == ((2, 4), (2, 9), ("ids", 9))
    assert not timing.failures(short) and not timing.failures(long)
    assert long.flops > 2 * short.flops


def test_every_form_is_loaded_from_its_own_checkpoint(capsys, monkeypatch):
    def here(folder, scheme, dtype, new_tokens):  # full_size.run without a process of its own
        return full_size.measure(folder, new_tokens, dtype=dtype)

    monkeypatch.setattr(loading, "run", here)
    config = model.configured("nano")
    suites = {"load": lambda _: loading.findings(config, torch.float32, ("int8", "fp8"), 2)}
    found = report.measure(suites, effort=SHORT)
    assert not found.failed and not found.rows
    wide, int8 = found.findings
    assert "bfloat16" in wide.label and "int8" in int8.label
    assert 0 < int8.values["weights"] < wide.values["weights"]
    assert 0 < int8.values["load_s"] < 60 and int8.values["touched"] > int8.values["anonymous"]
    assert int8.values["again_tokens_per_s"] > 0
    assert found.document()["findings"][1]["values"] == int8.values
    assert "loaded in" in capsys.readouterr().out


def test_what_a_scheme_loses_is_found(capsys):
    suites = {"fidelity": lambda _: model.lost(["nano"], ["int8"], torch.float32, count=10)}
    found = report.measure(suites, effort=SHORT)
    assert not found.failed and {f.operator for f in found.findings} == {"fidelity"}
    labels = {f.label for f in found.findings}
    assert len(labels) == len(found.findings) and all("nano, " in label for label in labels)
    for finding in found.findings:
        values = finding.values
        assert values["as wide"] >= 0.9 and 0.5 < values["bytes of bfloat16"] < 0.9
    assert "quantized 1.0000" in capsys.readouterr().out


def test_the_parts_of_each_size():
    assert set(model.suites(size="nano")) == {
        "encode", "lengths", "decode", "fidelity", "load",
    }  # fmt: skip
    assert set(model.suites(["text", "load"])) == {"text", "load"}
    with pytest.raises(ValueError, match="no text at size nano; there are encode"):
        model.suites(["text"], size="nano")
    with pytest.raises(ValueError, match="--size must be one of nano, layer or 14b, got 'huge'"):
        model.suites(size="huge")
