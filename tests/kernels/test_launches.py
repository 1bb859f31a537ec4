"""How Triton would compile the launches on a GPU: tests/launches.py, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def report() -> dict[str, list[str]]:
    script = Path(__file__).parents[1] / "launches.py"
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script], env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_another_batch_size_compiles_nothing_again(report):
    assert report["again"] == []


def test_sizes_of_one_compile(report):
    """Triton makes constants of them, which have no .to() and no .dtype."""
    assert report["broken"] == []
