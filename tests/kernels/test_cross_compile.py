"""Every Triton kernel's default configuration, compiled for GPUs that are not here.

sm90 in bf16 for all cases and one case of each file for the other chips and dtypes, which takes
seconds; all of it with INTERNVL_CROSS_COMPILE=all. Triton keeps what it compiled on disk.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from internvl_engine.kernels.triton import _cross_compile
from internvl_engine.kernels.triton._cross_compile import Row

ROOT = Path(__file__).parents[2]
ALL = os.environ.get("INTERNVL_CROSS_COMPILE") == "all"
STEMS = sorted(p.stem for p in (ROOT / "kernels/triton").glob("[!_]*.py"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[Row]:
    """The table, from a process without the interpreter."""
    file = tmp_path_factory.mktemp("cross") / "rows.json"
    command = [sys.executable, "-m", _cross_compile.__name__, "--json", str(file)]
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        command if ALL else [*command, "--sample"], env=variables, capture_output=True, text=True
    )
    assert file.exists(), done.stderr
    return [Row(**row) for row in json.loads(file.read_text())]


def test_no_spills_shared_memory_that_fits_and_matrix_instructions(rows):
    assert not [problem for row in rows for problem in row.problems()]


def test_every_kernel_is_in_the_table(rows):
    assert sorted({row.operator for row in rows if row.architecture == "sm90"}) == STEMS
    for architecture in ("sm80", "sm100", "gfx942"):
        assert sorted({row.operator for row in rows if row.architecture == architecture}) == STEMS


def test_every_kernel_is_compiled_in_every_dtype(rows):
    for dtype in _cross_compile.DTYPES:
        found = {row.operator for row in rows if dtype in row.case and row.architecture == "sm90"}
        assert sorted(found) == STEMS, dtype


def test_two_programs_of_attention_share_a_multiprocessor_on_hopper(rows):
    """One, as 128 x 64 tiles in 8 warps are, leaves the matrix unit idle in every softmax."""
    wide = [
        row
        for row in rows
        if row.operator in ("attention", "qk_norm_attention")
        and row.case.startswith("forward")
        and "D=128" in row.case
        and row.case.endswith("bf16")
        and row.architecture == "sm90"
    ]
    assert len(wide) > 4
    assert {row.case: row.resident() for row in wide if row.resident() < 2} == {}


def test_programs_on_a_multiprocessor_are_counted_by_what_they_need():
    needs = {
        "operator": "x", "case": "y", "architecture": "sm90", "registers": 128, "stack": 0,
        "shared": 0, "matrix": 0, "needs_matrix": False, "warps": 4,
    }  # fmt: skip
    assert Row(**needs).resident() == 4
    assert Row(**needs | {"registers": 204, "warps": 8}).resident() == 1  # 52,224 of 65,536
    assert Row(**needs | {"shared": 100 << 10}).resident() == 2  # of 228 KiB
    assert Row(**needs | {"registers": 16, "warps": 16}).resident() == 4  # 64 warps


def test_the_recorded_tables_have_every_case():
    """One for each version of Triton, made by the code as it is."""
    text = (ROOT / "benchmarks" / "results" / "cross_compile.md").read_text()
    wanted = {
        (case.operator, case.name, architecture)
        for architecture in ("sm80", "sm90", "sm100", "gfx942")
        for dtype in (_cross_compile.DTYPES if architecture == "sm90" else ["bf16"])
        for case in _cross_compile.cases(architecture, dtype=dtype)
    }
    tables = text.split("# Cross-compiled kernels (triton ")[1:]
    assert len(tables) == 2
    for table in tables:
        lines = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
        found = {
            (operator.removeprefix("| "), case, target) for operator, case, target, *_ in lines
        }
        assert found == wanted, table[:10]


def test_the_attention_kernels_and_linear_need_the_matrix_unit(rows):
    """A case that forgot to ask for it would pass without."""
    needing = {"attention", "qk_norm_attention", "linear", "linear_int8", "linear_int4"}
    for stem in needing & set(STEMS):
        of_stem = [row for row in rows if row.operator == stem and row.architecture == "sm90"]
        assert any(row.needs_matrix and row.matrix > 0 for row in of_stem), stem


def test_problems_are_found():
    """The checks themselves, on rows that are wrong in one way each."""
    good = {
        "operator": "x", "case": "forward", "architecture": "sm90", "registers": 255, "stack": 0,
        "shared": 227 << 10, "matrix": 4, "needs_matrix": True, "warps": 4,
    }  # fmt: skip
    assert Row(**good).problems() == []
    for change, text in (
        ({"stack": 8}, "8 bytes of stack"),
        ({"shared": (227 << 10) + 16}, "of shared memory, 232448 there are"),
        ({"matrix": 0}, "no matrix instruction"),
    ):
        (problem,) = Row(**good | change).problems()
        assert text in problem


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("source", sorted(p.stem for p in (ROOT / "csrc/cuda").glob("*.cu")))
def test_cuda_sources_compile_without_spills(source, tmp_path):
    targets = [f"-gencode=arch=compute_{t},code=sm_{t}" for t in ("80", "90a", "100")]
    command = [
        "nvcc", "-std=c++17", "-O3", "-fatbin", *targets, "--threads=2", "--Werror=all-warnings",
        "-Xptxas=-v,--warn-on-spills", "-o", str(tmp_path / "out.fatbin"),
        str(ROOT / "csrc/cuda" / f"{source}.cu"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    used = [line for line in done.stderr.splitlines() if "stack frame" in line]
    assert used and all("0 bytes stack frame, 0 bytes spill" in line for line in used), used
