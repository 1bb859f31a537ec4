"""What loading costs: anonymous memory, and nothing for a model that stays in its files."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from published_layout import write_sparse, write_sparse_shards

from internvl_engine.benchmarks.random_checkpoint import write_random
from internvl_engine.checkpoint.writing import Planned, write_shards
from internvl_engine.configuration import InternVLConfig
from internvl_engine.modeling import InternVL_G

from golden_vectors import GOLDEN

WIDTHS = {  # 160 million parameters, 320 MB in bfloat16
    "vision_config": {
        "hidden_size": 1024, "num_attention_heads": 8, "intermediate_size": 4096,
        "num_hidden_layers": 5,
    },
    "qllama_config": {
        "vocab_size": 12000, "hidden_size": 1024, "num_attention_heads": 8,
        "intermediate_size": 2816, "num_hidden_layers": 4,
    },
    "num_query_token": 8,
}  # fmt: skip

# One process for all cases, as imports are most of the time. A line of output is a case.
MEASURE = """
import json, sys, threading
from internvl_engine.modeling import InternVL_G

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def run(folder, arguments):
    before = peak = anonymous()
    done = threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    model = InternVL_G.from_pretrained(folder, **arguments)
    after = anonymous()
    done.set()
    watcher.join()
    weights = sum(p.nbytes for p in model.parameters())
    return {"kept": after - before, "peak": max(peak, after) - before, "weights": weights}

cases = json.loads(sys.argv[1])
run(*cases[0])  # imports and thread pools
for case in cases:
    print(json.dumps(run(*case)))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    config = InternVLConfig(**WIDTHS)
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in InternVL_G(config).state_dict().items()}
    planned = [Planned(name, shape, torch.bfloat16) for name, shape in shapes.items()]
    values = torch.randn(1 << 16).bfloat16()

    def read(name):
        count = math.prod(shapes[name])
        return values.repeat(count // len(values) + 1)[:count].reshape(shapes[name])

    write_shards(folder, planned, read, 100_000_000)
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("quantized"), "int8", InternVLConfig(**WIDTHS))


@pytest.fixture(scope="module")
def measured(tmp_path_factory, checkpoint, quantized, full_size_shapes):
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    huge = tmp_path_factory.mktemp("huge")
    write_sparse(huge / "model.safetensors", full_size_shapes)
    InternVLConfig().save_pretrained(huge)
    cases = {
        "mapped": (checkpoint, {"dtype": "bfloat16"}),
        "larger than memory": (huge, {"dtype": "bfloat16"}),
        "converted part": (checkpoint, {"dtype": "float32", "parts": "text"}),
        "converted": (checkpoint, {"dtype": "float32"}),
        "stored in 8 bits": (quantized, {"dtype": "bfloat16"}),
        "into 8 bits": (checkpoint, {"dtype": "bfloat16", "quantize": "int8"}),
    }
    command = [sys.executable, "-c", MEASURE, json.dumps([(str(f), a) for f, a in cases.values()])]
    # A fixed threshold: glibc would keep freed weights for later cases otherwise.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    output = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=huge,
        timeout=300,
    )
    return dict(zip(cases, map(json.loads, output.stdout.splitlines()), strict=True))


def test_weights_in_the_stored_dtype_stay_in_their_files(measured):
    memory = measured["mapped"]
    assert memory["weights"] > 300e6
    assert memory["peak"] < 0.05 * memory["weights"]


def test_converted_weights_are_held_once(measured):
    memory = measured["converted"]
    assert memory["weights"] > 600e6
    assert 0.9 * memory["weights"] < memory["kept"] <= memory["peak"]
    assert memory["peak"] <= 1.05 * memory["weights"]


def test_parts_hold_only_themselves(measured):
    memory = measured["converted part"]
    assert 200e6 < memory["weights"] < 300e6
    assert 0.9 * memory["weights"] < memory["kept"] <= memory["peak"]
    assert memory["peak"] <= 1.05 * memory["weights"]


def test_quantized_weights_stay_in_their_files(measured):
    memory = measured["stored in 8 bits"]
    assert 160e6 < memory["weights"] < 200e6
    assert memory["peak"] < 0.05 * memory["weights"]


def test_weights_that_are_quantized_on_the_way_are_never_wide_together(measured):
    memory = measured["into 8 bits"]
    assert 160e6 < memory["weights"] < 200e6
    # What stays wide is mapped where it is stored in the dtype asked for: a tenth of this model.
    assert 0.85 * memory["weights"] < memory["kept"] <= memory["peak"]
    assert memory["peak"] <= 1.05 * memory["weights"]


def test_one_file_larger_than_the_memory(measured):
    memory = measured["larger than memory"]
    assert memory["weights"] == 2 * 13_834_975_747
    assert memory["peak"] < 100e6


@pytest.fixture(scope="module")
def full_size_shapes():
    return json.loads((GOLDEN / "checkpoint_14b.json").read_text())


def test_the_14b_at_full_size(tmp_path, full_size_shapes):
    sizes = write_sparse_shards(tmp_path, full_size_shapes)
    assert [round(size / 1e9, 2) for size in sizes] == [9.93, 9.98, 7.76]  # as on the hub
    InternVLConfig().save_pretrained(tmp_path)
    model = InternVL_G.from_pretrained(tmp_path, dtype=torch.bfloat16)
    state = model.state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == full_size_shapes
    assert len(state) == 1048
    assert sum(tensor.numel() for tensor in state.values()) == 13_834_975_747
