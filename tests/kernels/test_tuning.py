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
    assert name == "rms_norm(3200, torch.bfloat16)"


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
