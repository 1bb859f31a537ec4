import importlib
import json

import pytest
import torch

from internvl_engine import kernels

pytest.importorskip("triton")
from internvl_engine.kernels.triton import _tuning

DEFAULTS = {name: {"BLOCK": 64, "num_warps": 4} for name in _tuning.ARCHITECTURES}
CANDIDATES = [{"BLOCK": block, "num_warps": 4} for block in (32, 64, 128)]
KEY = (3200, "bf16")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch, request):
    """Results of this test only, and but on a GPU a timer that prefers BLOCK = 128."""
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path))
    timed = []

    def do_bench(run):
        timed.append(run())
        return 1.0 / timed[-1]["BLOCK"]

    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr("triton.testing.do_bench", do_bench)
    forget()
    yield timed
    forget()


def forget() -> None:
    """What a new process starts with."""
    _tuning._stored.cache_clear()
    _tuning._resolved.clear()


def config(operator="op", run=lambda config: config):
    return _tuning.launch_config(operator, KEY, DEFAULTS, CANDIDATES, run, 0)


def test_defaults_serve_until_asked_to_tune(empty_cache):
    assert config() == DEFAULTS[_tuning.architecture(0)] | _tuning.OPTIONS
    assert not empty_cache
    assert _tuning.launch_config("op", KEY, DEFAULTS, CANDIDATES, None, -1) == DEFAULTS["sm90"]


def test_tunes_once_and_never_again(empty_cache, tmp_path):
    config()
    with _tuning.tuning():
        assert config()["BLOCK"] == 128
        assert len(empty_cache) == len(CANDIDATES)
    forget()  # as in the next process
    assert config()["BLOCK"] == 128
    with _tuning.tuning():
        assert config()["BLOCK"] == 128
    assert len(empty_cache) == len(CANDIDATES)
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text()) == {f"op{KEY}": CANDIDATES[2]}


def test_keeps_what_another_process_stored_meanwhile(tmp_path):
    with _tuning.tuning():
        config()
        (file,) = tmp_path.iterdir()
        file.write_text(json.dumps({"theirs": CANDIDATES[0], **json.loads(file.read_text())}))
        config("other")
    assert set(json.loads(file.read_text())) == {"theirs", f"op{KEY}", f"other{KEY}"}


def test_what_does_not_fit_the_chip_is_left_out():
    from triton.runtime.errors import OutOfResources, PTXASError

    def run(config):
        if config["BLOCK"] > 64:
            raise PTXASError("too many registers")
        if config["BLOCK"] > 32:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return config

    with _tuning.tuning():
        assert config(run=run)["BLOCK"] == 32

    def never(config):
        raise OutOfResources(300_000, 232_448, "shared memory")

    with pytest.raises(ValueError, match="none of 3 configurations runs"):
        _tuning.tune("third", KEY, CANDIDATES, never)


def test_what_the_compiler_fails_on_is_left_out_and_what_the_gpu_does_is_not():
    def run(config):
        if config["BLOCK"] == 128:  # as Triton's passes say it: no type of its own
            raise RuntimeError("PassManager::run failed")
        return config

    with _tuning.tuning():
        assert config(run=run)["BLOCK"] == 64

    def broken(config):
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        _tuning.tune("other", KEY, CANDIDATES, broken)


def key_of(module: str, launch, monkeypatch) -> tuple:
    """The tuner's key of a launch, which ends there."""

    class Found(Exception):
        pass

    def stop(operator, key, *rest):
        raise Found(operator, key)

    monkeypatch.setattr(f"internvl_engine.kernels.triton.{module}.launch_config", stop)
    with pytest.raises(Found) as found:
        launch()
    return found.value.args


LAUNCHES = {
    "linear": lambda m, n: m.linear_triton(rows(n), rows(16)),
    "linear_int8": lambda m, n: m.linear_int8_triton(rows(n), *kernels.quantize_int8(ones(16))),
    "linear_int4": lambda m, n: m.linear_int4_triton(
        rows(n), *kernels.quantize_int4(ones(16)), 16
    ),
    "rms_norm_quant": lambda m, n: m.rms_norm_quant_triton(rows(n), rows(1)[0], 1e-6, torch.int8),
    "gelu_quant": lambda m, n: m.gelu_quant_triton(rows(n), torch.int8),
    "rms_norm": lambda m, n: m.rms_norm_triton(rows(n), rows(1)[0], 1e-6),
    "rms_norm backward": lambda m, n: m.rms_norm_backward_triton(
        rows(n), rows(n), rows(1)[0], 1e-6
    ),
    "add_rms_norm": lambda m, n: m.add_rms_norm_triton(rows(n), rows(n), None, rows(1)[0], 1e-6),
    "add_rms_norm backward": lambda m, n: m.add_rms_norm_backward_triton(
        *[rows(n)] * 4, None, rows(1)[0], 1e-6
    ),
    "swiglu": lambda m, n: m.swiglu_triton(rows(n)),
    "swiglu backward": lambda m, n: m.swiglu_backward_triton(rows(n)[:, :8], rows(n)),
    "rotary": lambda m, n: m.rotary_triton(*[heads(n)] * 2, rows(4), rows(4), places(n)),
    "rotary_append": lambda m, n: m.rotary_append_triton(
        *[heads(n)] * 3, rows(4), rows(4), places(n), places(n)[0], heads(n), heads(n)
    ),
    "attention": lambda m, n: m.attention_triton(
        *[heads(n)] * 3, "full", 0, None, 1.0, False, False
    ),
    "qk_norm_attention": lambda m, n: m.qk_norm_attention_triton(
        torch.empty(n, 4, 3, 2, 32), None, None, 1e-6, 1.0, False
    ),
    "decode_attention": lambda m, n: m.decode_attention_triton(
        heads(n)[:, :, :1], heads(n), heads(n), None, None, 1.0
    ),
    "pooling_attention": lambda m, n: m.pooling_attention_triton(
        heads(n)[:, 0], heads(n)[:, 0], 1e-5
    ),
}  # fmt: skip
SHARED = {
    "rms_norm": "_norm", "add_rms_norm": "_add_norm",
    "linear": "_linear", "linear_int8": "_linear", "linear_int4": "_linear",
}  # fmt: skip


def rows(count: int) -> torch.Tensor:
    return torch.empty(count, 16)


def ones(count: int) -> torch.Tensor:
    return torch.ones(count, 16)


def heads(batch: int) -> torch.Tensor:
    return torch.empty(batch, 2, 4, 32)


def places(batch: int) -> torch.Tensor:
    return torch.zeros(batch, 4, dtype=torch.long)


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_size_of_a_batch_has_a_part_in_the_key(name, monkeypatch):
    """A winner at 257 rows must not decide for 16,448, and one more row is nothing new."""
    stem = name.split()[0]
    module = importlib.import_module(f"internvl_engine.kernels.triton.{stem}")

    def key(batch: int) -> tuple:
        where = SHARED.get(stem, stem)
        return key_of(where, lambda: LAUNCHES[name](module, batch), monkeypatch)

    assert key(17) == key(32) != key(257)
    with kernels.batch_invariant():
        assert key(17) == key(257)


def test_the_default_is_timed_too():
    """The best of the candidates may be worse."""
    large = {name: {"BLOCK": 256, "num_warps": 8} for name in _tuning.ARCHITECTURES}
    with _tuning.tuning():
        found = _tuning.launch_config("op", KEY, large, CANDIDATES, lambda config: config, 0)
    assert found == large["sm90"] | _tuning.OPTIONS


def test_nothing_is_timed_while_a_cuda_graph_is_captured(empty_cache, monkeypatch):
    with _tuning.tuning():
        monkeypatch.setattr(_tuning, "_capturing", lambda: True)
        assert config() == DEFAULTS[_tuning.architecture(0)] | _tuning.OPTIONS
        assert not empty_cache
        monkeypatch.setattr(_tuning, "_capturing", lambda: False)
        assert config()["BLOCK"] == 128


def test_a_stored_configuration_that_the_kernel_no_longer_has_is_ignored(tmp_path):
    with _tuning.tuning():
        config()
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps({f"op{KEY}": {"BLOCK_OF_OLD": 128, "num_warps": 4}}))
    forget()
    assert config() == DEFAULTS[_tuning.architecture(0)] | _tuning.OPTIONS
    with _tuning.tuning():
        assert config()["BLOCK"] == 128


@pytest.mark.parametrize("vectors", [1, 2, 3])
@pytest.mark.parametrize("cols", [16, 1024, 4096, 8192, 32768])
def test_rows_in_flight_fit_the_shared_memory(cols, vectors):
    """In the backward of norms: the stages before the last, of up to four inputs in float32."""
    from internvl_engine.kernels.triton import _cross_compile, _norm

    blocks = _norm.backward_tile(cols, vectors)
    for architecture, config in _norm.backward_defaults(cols, vectors).items():
        rows = (config["STAGES"] - 1) * blocks["BLOCK_R"]
        needed = 4 * 4 * rows * blocks["BLOCK_C"]
        assert needed <= _cross_compile.SHARED_LIMIT[architecture] - 4096  # and what is reduced


@pytest.mark.gpu
def test_a_gpu_tunes_a_kernel_stores_the_winner_and_gives_the_same_result(tmp_path):
    x = torch.randn(300, 3200, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(3200, device="cuda", dtype=torch.bfloat16)
    before = kernels.rms_norm(x, weight)
    with _tuning.tuning():
        tuned = kernels.rms_norm(x, weight)
    torch.testing.assert_close(tuned, before)
    (file,) = tmp_path.iterdir()
    (name,) = json.loads(file.read_text())
    assert name == "rms_norm(3200, torch.bfloat16, 512)"


@pytest.mark.parametrize(
    "capability, expected",
    [((8, 0), "sm80"), ((8, 9), "sm80"), ((9, 0), "sm90"), ((10, 0), "sm100"), ((12, 0), "sm80")],
)
def test_every_gpu_finds_its_architecture(capability, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    _tuning.architecture.cache_clear()
    try:
        assert _tuning.architecture(0) == expected
    finally:
        _tuning.architecture.cache_clear()
