"""Weights that are read at every use: the same results, and what stays in memory."""

import pickle
import sys
from pathlib import Path

import pytest
import torch

from internvl_engine.benchmarks.random_checkpoint import write_random
from internvl_engine.checkpoint.streaming import FORGET, READ_AHEAD, Stream, advise, are_mapped
from internvl_engine.configuration import InternVLConfig
from internvl_engine.modeling import InternVL_G

BF16 = {"dtype": torch.bfloat16}
MB = 1 << 20

if sys.platform != "linux":
    pytest.skip("madvise", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Layers of 8 MB in the vision tower and in QLLaMA, so that pages matter."""
    config = InternVLConfig.from_preset("nano")
    config.vision_config.hidden_size, config.vision_config.intermediate_size = 512, 3072
    config.vision_config.num_attention_heads, config.vision_config.num_hidden_layers = 4, 4
    config.qllama_config.hidden_size, config.qllama_config.intermediate_size = 512, 2048
    config.qllama_config.num_attention_heads, config.qllama_config.head_dim = 4, 128
    values = config.to_dict()
    return write_random(tmp_path_factory.mktemp("streamed"), None, InternVLConfig(**values))


def resident(folder: Path) -> int:
    """Bytes of the weight files that are in this process's memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split(maxsplit=1)[0].endswith(":"):
            inside = str(folder) in line
        elif inside and line.startswith("Rss:"):
            found += 1024 * int(line.split()[1])
    return found


def size(module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


@torch.no_grad()
def test_streamed_layers_leave_and_come_back(folder):
    model = InternVL_G.from_pretrained(folder, **BF16)
    pixels = torch.randn(1, 3, 28, 28, **BF16)
    expected = model.encode_image(pixels)
    tower = size(model.vision_model.encoder)
    assert resident(folder) > tower > 30 * MB
    stream = Stream(model, 0)
    assert stream.nbytes > 0.99 * size(model)
    for _ in range(2):
        assert torch.equal(model.encode_image(pixels), expected)
    # Pages around one that is read are mapped with it.
    assert resident(folder) < tower / 4


def test_what_fits_stays_and_the_language_model_first(folder):
    model = InternVL_G.from_pretrained(folder, **BF16)
    assert Stream(model, 1 << 40).streamed == []
    language = size(model.qllama) + size(model.vision_model.embeddings)
    layer = size(model.vision_model.encoder.layers[0])
    others = size(model) - language - size(model.vision_model.encoder)
    stream = Stream(model, language + others + 2 * layer + layer // 2)
    assert stream.streamed == [f"vision_model.encoder.layers.{n}" for n in (2, 3)]
    assert stream.nbytes == 2 * layer
    assert not model.vision_model.encoder.layers[0]._forward_hooks


def test_weights_that_were_written_to_stay(folder):
    weight = InternVL_G.from_pretrained(folder, **BF16).vision_model.encoder.layers[0].mlp.fc1
    with torch.no_grad():
        weight.weight[5] = 7.0
    assert advise(weight.parameters(), FORGET) and advise(weight.parameters(), READ_AHEAD)
    assert bool((weight.weight[5] == 7.0).all()) and not bool((weight.weight[6] == 7.0).any())


def test_what_is_mapped(folder):
    assert are_mapped(InternVL_G.from_pretrained(folder, **BF16).parameters())
    model = InternVL_G.from_pretrained(folder, dtype=torch.float32)
    assert not are_mapped(model.parameters())
    quantized = InternVL_G.from_pretrained(folder, quantize="int8", **BF16)
    assert not are_mapped(quantized.parameters())


def test_a_streamed_model_can_be_pickled(folder):
    model = InternVL_G.from_pretrained(folder, parts="image", **BF16)
    stream = Stream(model, 0)
    stream.read_ahead(model.vision_model.embeddings)
    assert pickle.loads(pickle.dumps(stream)).streamed == stream.streamed
