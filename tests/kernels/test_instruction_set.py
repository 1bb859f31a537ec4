"""Which of the compiled instruction sets is used: the best, or the one of INTERNVL_ISA."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("internvl_engine._native", reason="built without a C++ compiler")

CODE = "from internvl_engine import _native; print(_native.instruction_set())"


def run(isa: str | None) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "INTERNVL_ISA"}
    if isa is not None:
        environment["INTERNVL_ISA"] = isa
    command = [sys.executable, "-c", CODE]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_an_empty_variable_is_as_unset():
    assert run("").stdout == run(None).stdout != ""


def test_the_portable_set_is_everywhere():
    assert run("portable").stdout == "portable\n"


@pytest.mark.parametrize("isa", ["avx9", "AVX2", " "])
def test_an_unknown_set_is_an_error_that_lists_what_there_is(isa):
    result = run(isa)
    assert result.returncode != 0
    assert f"ValueError: INTERNVL_ISA={isa}: this processor and this build have" in result.stderr
    assert result.stderr.rstrip().endswith("portable")


SETS = ["avx512bf16", "avx512vnni", "avx512", "avxvnni", "avx2", "portable"]


def test_the_sets_are_offered_from_the_best_on():
    """Those that multiply bytes too, which differ from the next in linears of 8 bits only."""
    offered = run("none").stderr.rstrip().rpartition(" have ")[2].split(", ")
    assert offered == [isa for isa in SETS if isa in offered]
    for isa in offered[:2]:
        assert run(isa).stdout == f"{isa}\n"
