"""Quantized checkpoints from the shell and in the facades: what people see of them."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_engine import pictures

from internvl_engine import InternVL, InternVLChat
from internvl_engine.assets import nano_chat_directory, nano_directory
from internvl_engine.cli import main
from internvl_engine.conversion import convert
from internvl_engine.schemes import Rule, Scheme
from internvl_engine.verification import verify
from internvl_engine.weights import QuantizedTensor

FP32 = {"dtype": torch.float32}
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The embedded models, quantized from the shell."""
    found = tmp_path_factory.mktemp("converted")
    for name, source in {"nano": nano_directory(), "chat": nano_chat_directory()}.items():
        for form in ("int8", "int4"):
            with pytest.raises(SystemExit) as ended:
                main(["convert", str(source), str(found / name / form), "--quantize", form])
            assert not ended.value.code
    return found


def held(engine) -> int:
    return sum(isinstance(p, QuantizedTensor) for p in engine.model.parameters())


@pytest.mark.parametrize("form, nearest", [("int8", 0.999), ("int4", 0.98)])
def test_the_embedded_model(folders, form, nearest):
    engine, wide = InternVL.from_pretrained(folders / "nano" / form, **FP32), InternVL.nano()
    assert held(engine) > 30 and engine.report.replaced
    assert engine.num_parameters == wide.num_parameters
    images = pictures(4)
    for mode in "cg":
        cosines = (engine.encode_image(images, mode) * wide.encode_image(images, mode)).sum(-1)
        assert cosines.min() > nearest, mode
    quantized = InternVL.nano(quantize=form)
    assert held(quantized) == held(engine)
    assert torch.equal(quantized.encode_image(images), engine.encode_image(images))
    assert engine.caption(images, max_new_tokens=6) == quantized.caption(images, max_new_tokens=6)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_the_embedded_chat_model(folders, form):
    engine = InternVLChat.from_pretrained(folders / "chat" / form, **FP32)
    assert held(engine) > 10
    quantized = InternVLChat.nano(quantize=form)
    for image in pictures(2):
        answer = engine.chat(image, "What is this?")
        assert answer == quantized.chat(image, "What is this?") and answer


@pytest.mark.parametrize("name", ["nano", "chat"])
def test_verify_looks_into_forms(folders, tmp_path, name):
    assert verify(folders / name / "int4").ok
    config = json.loads((folders / name / "int4" / "config.json").read_text())
    assert config["quantization_config"]["scheme"] == "int4"
    for path in (folders / name / "int4").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(tmp_path / WEIGHTS)
    scales = next(key for key in state if key.endswith("mlp.down_proj.weight.scales"))
    state[scales].view(-1)[0] = torch.nan
    save_file(state, tmp_path / WEIGHTS)
    report = verify(tmp_path)
    assert not report.ok and scales.removesuffix(".scales") in str(report)


@pytest.mark.parametrize("name", ["nano", "chat"])
def test_verify_compares_the_forms_with_the_scheme(folders, tmp_path, name):
    for path in (folders / name / "int8").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    report = verify(tmp_path)
    assert report.ok and "'int8' in config.json, " in str(report)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["scheme"] = "int4"
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = verify(tmp_path)
    assert not report.ok
    [found] = [each for each in report.findings if each.passed is False]
    assert found.check == "forms" and found.detail.startswith("'int4' in config.json, but ")
    assert "is int8, not int4" in found.detail and "proj.weight in " in found.detail


def test_verify_knows_schemes_of_ones_own(tmp_path):
    """Groups count, and weights that the scheme leaves wide."""
    scheme = Scheme("mine", (Rule("k_proj", "int4", 128), Rule("fc1", "int8")))
    convert(nano_directory(), tmp_path / "out", quantize=scheme)
    assert verify(tmp_path / "out").ok
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    for rules, wrong in {
        (Rule("k_proj", "int4", 64), Rule("fc1", "int8")): "is int4, not int4 in groups of 64",
        (Rule("k_proj", "int4", 128),): "is int8, not wide",
    }.items():
        config["quantization_config"] |= Scheme("mine", rules).to_dict()
        path.write_text(json.dumps(config))
        assert wrong in str(verify(tmp_path / "out"))


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_commands_quantize_while_they_load(folders, tmp_path, capsys, form):
    Image.fromarray(pictures(1)[0]).save(tmp_path / "one.png")

    def described(*options):
        with pytest.raises(SystemExit) as ended:
            main(["caption", str(tmp_path / "one.png"), "--dtype", "float32", "--json", *options])
        assert not ended.value.code
        return json.loads(capsys.readouterr().out)["results"]

    stored = described("--model", str(folders / "nano" / form))
    assert described("--model", str(nano_directory()), "--quantize", form) == stored


def test_a_scheme_that_there_is_not(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(nano_directory()), str(tmp_path / "out"), "--quantize", "int3"])
    assert ended.value.code
    assert "quantize must be one of int8, int4, fp8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
