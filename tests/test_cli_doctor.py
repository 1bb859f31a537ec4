"""`internvl doctor`: what it finds, also where other packages are broken."""

import json
import subprocess
import sys

import pytest
import torch

from internvl_engine import kernels
from internvl_engine.cli import doctor, main
from internvl_engine.cli.trial import Trials


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs doctor in this process, trying no packages: (exit code, stdout, stderr)."""
    monkeypatch.setattr(doctor, "TRIED", ())
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            main(["doctor", *arguments])
        return exit.value.code or 0, *capsys.readouterr()

    return call


def test_doctor(run, monkeypatch):
    monkeypatch.setenv("INTERNVL_ISA", "avx2")
    code, out, err = run("--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["packages"]["torch"] == torch.__version__
    assert set(found["dtype_auto"]) >= {"cpu"} and found["operators"]["rms_norm"]
    assert found["cpu"]["limits"]["INTERNVL_ISA"] == "avx2"
    sizes = {(row["parts"], row["dtype"]): row for row in found["internvl_14b"]}
    assert sizes["all", "bfloat16"]["parameters"] == 13_834_975_747
    assert sizes["image", "float32"]["weights_gb"] == 23.7
    assert sizes["all", "int8"]["weights_gb"] == 14.0 and sizes["all", "int4"]["weights_gb"] == 10.5
    assert 0 < found["memory_gb"]["available"] <= found["memory_gb"]["total"]
    code, out, err = run()
    assert (code, err) == (0, "") and "InternVL-14B here" in out and "rms_norm" in out
    assert "held back by INTERNVL_ISA=avx2" in out
    assert f"dtype=auto on cpu is {found['dtype_auto']['cpu']}: the processor" in out


@pytest.mark.parametrize(
    "gigabytes, message", [(22, "parts='all' with quantize='int8'"), (500, None)]
)
def test_what_does_not_fit_says_what_would(run, monkeypatch, gigabytes, message):
    memory = {"total": gigabytes * 10**9, "available": gigabytes * 10**9}
    monkeypatch.setattr(doctor, "memory", lambda: memory)
    found = json.loads(run("--json")[1])
    (advice,) = found["advice"].values()
    assert advice is None if message is None else message in advice
    fits = [row for row in found["internvl_14b"] if row["fits"]]
    # Of 6 parts in float32, bfloat16, int8 and int4: with 22 GB text and images in bfloat16.
    assert len(fits) == (24 if message is None else 2 + 12)
    sound = "No problems" if kernels._library.native else "native CPU kernels: not built"
    assert (advice or sound) in run()[1]


def test_doctor_says_what_to_do(run, monkeypatch):
    monkeypatch.setattr(doctor, "_native", lambda name: {
        "built": name == "_native_cuda", "instruction_set": None, "error": "no libcuda.so",
    })  # fmt: skip
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "tqdm" else "1")
    problems = {problem["what"]: problem["do"] for problem in doctor.examine()["problems"]}
    assert problems["tqdm is not installed"] == "pip install tqdm"
    assert any("kernels were not built" in what for what in problems)
    assert any("no libcuda.so" in what for what in problems)


BROKEN = {
    "raises_here": "raise ImportError('undefined symbol: _ZN3c10')",
    "raises_anything": "raise RuntimeError('operator torchvision::nms does not exist')",
    "leaves_here": "raise SystemExit(3)",
    "dies_here": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "sound_here": "print('noise')",
    "slow_here": "import time; time.sleep(60)",
}


@pytest.fixture
def broken(monkeypatch, tmp_path):
    for name, code in BROKEN.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "TRIED", ("raises_here", "absent_here"))
    return tmp_path


def test_broken_packages_are_named_and_nothing_else_breaks(broken, monkeypatch, capfd):
    errors = Trials(BROKEN).errors(1.0)
    assert errors == {
        "raises_here": "ImportError: undefined symbol: _ZN3c10",
        "raises_anything": "RuntimeError: operator torchvision::nms does not exist",
        "leaves_here": "SystemExit: 3",
        "dies_here": "it ends Python by SIGSEGV",
    }
    assert capfd.readouterr() == ("", "")
    problems = doctor.examine(1.0)["problems"]
    named = [p for p in problems if "raises_here is installed and does not import" in p["what"]]
    assert named and "pip uninstall raises-here" in named[0]["do"]


def test_it_imports_no_transformers():
    """A process of its own: what it imports is what makes people wait."""
    code = (
        "import sys; from internvl_engine.cli import doctor, main\n"
        "doctor.TRIED = ()\n"
        "try: main(['doctor', '--json'])\n"
        "except SystemExit: pass\n"
        "print({'transformers', 'peft', 'PIL'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "set()\n" and json.loads(done.stdout)["native"]
