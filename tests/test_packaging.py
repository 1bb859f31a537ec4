"""What is installed, from where, and how little of it an import costs."""

import ast
import importlib
import importlib.metadata
import re
import shutil
import stat
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import internvl_engine

tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SURFACE = {  # all that will be public, by module
    "accelerate": ["accelerate"],
    "configuration": ["InternVLConfig", "InternVisionConfig", "VisionLanguageConfig"],
    "engine": ["InternVL"],
    "modeling.chat": ["VisionLanguageModel"],
    "modeling.internvl": ["InternVLModel", "InternVL_C", "InternVL_G"],
    "modeling.vision": ["InternVisionModel"],
    "processing": ["InternVLProcessor"],
}


def python(code: str, cwd: Path) -> str:
    """Runs code in a fresh interpreter and returns what it prints."""
    run = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def exists(module: str) -> bool:
    path = ROOT.joinpath("internvl_engine", *module.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


@pytest.mark.parametrize("module", SURFACE)
def test_what_exists_is_public(module):
    if not exists(module):
        assert not [n for n, where in internvl_engine._PUBLIC.items() if where == module]
        return
    for name in SURFACE[module]:
        assert internvl_engine._PUBLIC.get(name) == module
        assert name in dir(internvl_engine) and name in internvl_engine.__all__
        defined = getattr(importlib.import_module(f"internvl_engine.{module}"), name)
        assert getattr(internvl_engine, name) is defined


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT / "internvl_engine/__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == internvl_engine._PUBLIC


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'InternVL_X'"):
        internvl_engine.InternVL_X  # noqa: B018


def test_import_is_light(tmp_path):
    heavy = {"transformers", "triton", "sentencepiece", "PIL", "typer", "tqdm", "peft"}
    code = "import sys, internvl_engine; print(*{name.split('.')[0] for name in sys.modules})"
    assert not heavy & set(python(code, tmp_path).split())


def test_importing_the_kernels_loads_neither_triton_nor_transformers(tmp_path):
    # A PyTorch that imports Triton by itself is not ours to answer for.
    code = (
        "import sys, torch; before = set(sys.modules); import internvl_engine.kernels;"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    loaded = set(python(code, tmp_path).split())
    assert "internvl_engine" in loaded
    assert not {"triton", "transformers"} & loaded


def test_version_has_one_source():
    assert importlib.metadata.version("internvl-engine") == internvl_engine.__version__


@pytest.mark.parametrize(
    "package, folder", [("kernels", "kernels"), ("benchmarks", "benchmarks"), ("modeling", None)]
)
def test_packages_are_installed_from_their_folders(package, folder):
    module = importlib.import_module(f"internvl_engine.{package}")
    assert Path(module.__file__).parent == ROOT / (folder or f"internvl_engine/{package}")


def test_the_clone_is_not_taken_for_hugging_faces_kernels():
    # Python puts the current folder first on its path; transformers then finds kernels/ there.
    code = (
        "import kernels, transformers.integrations.hub_kernels;"
        "from transformers.utils import is_kernels_available as hub;"
        "print(kernels.__file__, hasattr(kernels, 'rms_norm'), hub());"
        "import internvl_engine.kernels as ours; print(hasattr(ours, 'rms_norm'))"
    )
    assert python(code, ROOT).split() == [f"{ROOT}/kernels/__init__.py", "False", "False", "True"]


def requirements(*extras: str) -> set[str]:
    """Normalised names of what the package and the given extras need."""
    lists = [PROJECT["project"]["optional-dependencies"][extra] for extra in extras]
    lines = sum(lists, PROJECT["project"]["dependencies"])
    names = {re.match(r"[\w-]+", line)[0].lower() for line in lines}
    return names - {"internvl-engine"}


IMPORTED_AS = {"flash-attn": "flash_attn"}
# By torch.onnx.export and by onnxruntime.quantization, which do not ask for them.
IMPORTED_BY_OTHERS = {"onnx", "onnxscript"}


def test_every_extra_has_code_that_uses_it():
    folders = ("internvl_engine", "kernels", "benchmarks")
    code = "\n".join(p.read_text() for folder in folders for p in (ROOT / folder).rglob("*.py"))
    extras = PROJECT["project"]["optional-dependencies"]
    for extra in set(extras) - {"test"}:
        for name in requirements(extra) - requirements() - IMPORTED_BY_OTHERS:
            module = IMPORTED_AS.get(name, name)
            used = rf'(?:from|import) {module}\b|find_spec\("{module}"\)'
            assert re.search(used, code), f"[{extra}] asks for {name}, which nothing imports"


def test_everything_that_make_installs_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    loose = [line for line in lines if "==" not in line.split(";")[0]]
    assert [line.split(">")[0] for line in loose] == ["triton"]  # its head says why
    pinned = {re.match(r"[\w-]+", line)[0] for line in lines}
    assert requirements("test", "train") <= pinned


def test_every_data_file_ships():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    for package, folder in (("internvl_engine", ""), ("internvl_engine.kernels", "kernels")):
        root = ROOT / (folder or package)
        # fnmatch's * crosses folders, as ** does in setuptools
        globs = [glob.replace("**/", "*") for glob in patterns[package]]
        for path in root.rglob("*"):
            if path.is_file() and path.suffix not in {".py", ".pyc", ".so", ".pyd"}:
                name = path.relative_to(root).as_posix()
                assert any(fnmatch(name, glob) for glob in globs), (
                    f"pyproject.toml leaves out {name}"
                )


FAKE_CMAKE = """#!/bin/sh
echo "$@" >> {log}
case "$*" in *--build*) ;; *) exit 0 ;; esac
for last; do :; done
{body}
"""


def build_with(
    cmake: str | None, tmp_path: Path, **environment: str
) -> subprocess.CompletedProcess:
    """Runs setup.py's build_ext on a copy of the package, with a CMake of our own or with none."""
    pytest.importorskip("setuptools")
    tree, tools = tmp_path / "tree", tmp_path / "tools"
    tools.mkdir()
    for folder in ("internvl_engine", "kernels", "benchmarks"):
        (tree / folder).mkdir(parents=True)
        shutil.copy(ROOT / folder / "__init__.py", tree / folder)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    if cmake is not None:
        script = tools / "cmake"
        script.write_text(FAKE_CMAKE.format(log=tmp_path / "log", body=cmake))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", tmp_path / "lib"],
        cwd=tree,
        env={"HOME": str(tmp_path), "PATH": str(tools), **environment},
        capture_output=True,
        text=True,
    )


def test_without_cmake_the_install_goes_on(tmp_path):
    run = build_with(None, tmp_path, INTERNVL_CUDA="0")
    assert run.returncode == 0, run.stderr
    assert "internvl_engine._native was not built" in run.stderr


def test_without_cmake_a_required_native_module_is_an_error(tmp_path):
    run = build_with(None, tmp_path, INTERNVL_CUDA="0", INTERNVL_NATIVE="1")
    assert run.returncode != 0
    assert "cmake" in run.stderr


def test_a_failing_cuda_module_costs_only_itself(tmp_path):
    fails = 'test "$last" != _native_cuda'
    run = build_with(fails, tmp_path, CUDACXX="nvcc", INTERNVL_NATIVE="1")
    assert run.returncode == 0, run.stderr
    assert "internvl_engine._native_cuda was not built" in run.stderr
    assert "internvl_engine._native was not built" not in run.stderr
    targets = [line.split()[-1] for line in (tmp_path / "log").read_text().splitlines()]
    assert targets[1::2] == ["_native", "_native_cuda"]


def test_cuda_is_left_out_on_request(tmp_path):
    run = build_with("true", tmp_path, CUDACXX="nvcc", INTERNVL_CUDA="0")
    assert run.returncode == 0, run.stderr
    assert "_native_cuda" not in (tmp_path / "log").read_text()


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_no_flag_from_outside_changes_for_which_processors_the_kernels_are_compiled(tmp_path):
    """CXXFLAGS=-march=native, which conda, Gentoo and HPC sites set, compiled all for this one."""
    script = tmp_path / "flags.cmake"
    script.write_text(f'include({ROOT}/csrc/baseline.cmake)\nmessage("<${{CMAKE_CXX_FLAGS}}>")')
    for given, kept in {
        "-march=native": "",
        "-O2 -march=nocona -mtune=haswell -g": "-O2 -mtune=haswell -g",
        "-mavx512f -mfma -mno-avx2 -fPIC": "-fPIC",
        "-mcpu=native -ffast-math -Ofast -Wall -m64": "-Wall -m64",
        "-DX=-y -isystem /opt/x-march=1/include": "-DX=-y -isystem /opt/x-march=1/include",
    }.items():
        command = ["cmake", f"-DCMAKE_CXX_FLAGS={given}", "-P", script]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        assert run.stderr.strip().replace("< ", "<") == f"<{kept}>"
    assert "include(csrc/baseline.cmake)" in (ROOT / "CMakeLists.txt").read_text()
