"""CUDA C++ kernels on the host: tests/cuda_on_host compiled once a process, and used like a GPU's.

Inside `host_gpu()` the launchers of kernels/_gemv.py and decode_qkv.py take CPU tensors and run
csrc/cuda by g++, with the chip and the order of threads that are asked for.
"""

import ctypes
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
from torch import Tensor

from internvl_engine.kernels import _cuda, _gemv
from internvl_engine.kernels import decode_qkv as _operator

FOLDER = Path(__file__).parent / "cuda_on_host"
COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(
    COMPILER is None or not sys.platform.startswith("linux"), reason="needs g++ and Linux"
)


@cache
def library() -> ctypes.CDLL:
    """csrc/cuda's linears, compiled in a few seconds."""
    target = Path(tempfile.mkdtemp(prefix="internvl-host-gpu-")) / "gemv.so"
    command = [
        COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra",
        "-Werror", "-Wno-sign-compare", "-Wno-unknown-pragmas", f"-I{FOLDER}",
        str(FOLDER / "gemv.cpp"), "-o", str(target),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(target))
    shutil.rmtree(target.parent)  # it stays mapped
    for name in ("linear", "decode_qkv"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


class HostModule:
    """internvl_engine._native_cuda as far as _gemv.py and decode_qkv.py need it."""

    def __init__(self) -> None:
        self.calls = 0

    def linear(self, dtype, x, eps, weight, epilogue, bias, residual, stride, y, squares, stream):
        self._run(
            library().linear, dtype, _numbers(x), ctypes.c_float(eps), _numbers(weight), epilogue,
            *map(ctypes.c_int64, (bias, residual, stride, y, squares)),
        )  # fmt: skip

    def decode_qkv(self, dtype, x, eps, weight, bias, target, k_cache, v_cache, stream):
        self._run(
            library().decode_qkv, dtype, _numbers(x), ctypes.c_float(eps), _numbers(weight),
            ctypes.c_int64(bias), *map(_numbers, (target, k_cache, v_cache)),
        )  # fmt: skip

    def _run(self, function, *arguments) -> None:
        self.calls += 1
        error = function(*arguments)
        if error:
            raise RuntimeError(error.decode())


def _numbers(values) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*values)


@contextmanager
def host_gpu(
    processors: int = 2, backwards: bool = False, arrives: tuple[Tensor, Tensor] | None = None
) -> Iterator[HostModule]:
    """Inside, CPU tensors go to the CUDA kernels.

    Args:
        processors: of the chip; few, so that a block gets several tiles.
        backwards: whether the last thread of a block goes first.
        arrives: (to, from): what the kernel before writes, while this one already runs.
    """
    copy = None
    if arrives is not None:
        to, source = arrives
        copy = _numbers((to.data_ptr(), source.data_ptr(), to.nbytes))
    library().configure(processors, backwards, copy)
    module = HostModule()
    operator = sys.modules[_operator.__module__]
    with (
        mock.patch.object(_gemv, "native_cuda", module),
        mock.patch.object(operator, "native_cuda", module),
        mock.patch.object(_cuda, "stream", lambda: 0),
    ):
        try:
            yield module
        finally:
            library().configure(2, False, None)
