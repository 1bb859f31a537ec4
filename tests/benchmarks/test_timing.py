"""What is timed, and that it is checked before."""

from dataclasses import replace
from time import sleep

import torch
from benchmark_cases import ON_CPU, PEAKS, SHORT, measured, some_case

from internvl_engine import kernels as operators
from internvl_engine.benchmarks import cases, report, timing
from internvl_engine.kernels import _library


def test_a_wrong_result_is_not_timed(capsys):
    x = torch.ones(4, 8)
    found = measured(
        some_case(
            right=lambda: x + x,
            wrong=lambda: x * 2.001,
            nan=lambda: torch.where(x > 0, torch.nan, x),
            narrow=lambda: (x * 2)[:3],
            two=lambda: (x * 2, x),
            breaks=lambda: x @ x,
            other=cases.Provider(lambda: x * 3, same=False),
        )
    )
    assert [row.provider for row in found.rows] == ["eager", "right", "other"]
    reasons = {line.split(", ")[2].split(":")[0]: line for line in found.failed}
    assert set(reasons) == {"wrong", "nan", "narrow", "two", "breaks"}
    assert "5.00e-04 from eager where 9.54e-07 is allowed" in reasons["wrong"]
    assert "RuntimeError" in reasons["breaks"]
    printed = capsys.readouterr().out
    assert printed.count("FAILED") == 5
    shares = {row.provider: row.share_of_peak for row in found.rows}
    assert shares["other"] is None and shares["right"] > 0


def test_what_breaks_stops_nothing_else():
    def broken(device):
        yield some_case()
        raise RuntimeError("no memory")

    found = report.measure({"broken": broken, "good": lambda _: [some_case()]}, effort=SHORT)
    assert len(found.rows) == 2 and found.failed == ["  broken: RuntimeError: no memory"]


def test_only_backends_that_serve_the_call_are_named():
    """A backend that passes a call on would lend its name to the time of another."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight = torch.ones(2, 8, device=device), torch.ones(8, device=device)
    order = _library._ORDER["rms_norm"][device.upper()]
    before = list(order)
    passes, breaks = ("passes", lambda *_: NotImplemented), ("breaks", lambda *_: 1 / 0)
    order[:] = [passes, breaks, *before]
    try:
        names = set(cases.ours("rms_norm", lambda: operators.rms_norm(x, weight, 1e-6)))
        assert order == [passes, breaks, *before]
    finally:
        order[:] = before
    assert "ours (breaks)" in names and "ours (passes)" not in names


@ON_CPU
def test_a_gradient_is_timed_by_the_backends_of_the_gradient():
    q = torch.randn(1, 2, 5, 32).bfloat16()
    backward = cases.ours("attention_backward", cases.gradient_of(operators.attention, q, q, q))
    own = operators.backends("attention_backward")["CPU"]
    assert backward and set(backward) <= {f"ours ({name})" for name in own}


def test_a_rival_that_does_not_run_is_left_out_and_named(capsys):
    def absent():
        raise OSError("no compiler\nmore words")

    assert cases.rival("torch.compile", absent) == {}
    assert capsys.readouterr().err == "  torch.compile does not run here: no compiler\n"


def test_peaks_and_what_bounds_a_case():
    found = timing.peaks("cpu", torch.float32, SHORT)
    assert 1e8 < found.copy < 1e13 and 1e8 < found.product < 1e14
    case = replace(some_case(), bytes=10**10, flops=2 * 10**11)
    assert PEAKS.bound(case) == ("product", 2000.0)
    assert PEAKS.bound(replace(case, flops=10**10)) == ("copy", 1000.0)


def test_processor_time_does_not_count_waiting():
    wait = {"wait": cases.Provider(lambda: sleep(0.01))}
    real = timing.time_in_turns(wait, "cpu", SHORT)["wait"]
    busy = timing.time_in_turns(wait, "cpu", replace(SHORT, processor_time=True))["wait"]
    assert min(real) >= 10 and max(busy) < 5
