"""Which backends of the operators run here, and memory that shows what was not written."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from internvl_engine import kernels

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# The interpreter computes on the bit patterns of bfloat16 (triton issue 11584).
DTYPES = {
    ("cpu", "native"): (torch.float32, torch.bfloat16),
    ("cpu", "triton"): (torch.float32, torch.float16),
    ("cuda", "triton"): FLOATS,
    ("cuda", "cuda"): FLOATS,
}


def runs(operator: str, *only: str) -> list:
    """Parameters "device, backend, dtype" of every backend of an operator that runs here."""
    found = kernels.backends(operator)
    return [
        pytest.param(device, backend, dtype, id=f"{device}-{backend}-{str(dtype)[6:]}")
        for (device, backend), dtypes in DTYPES.items()
        if backend in found[device.upper()]
        and (not only or backend in only)
        and (device == "cpu" or torch.cuda.is_available())
        for dtype in dtypes
    ]


def interpreted(backend: str, device: str) -> bool:
    """Whether this run is slow: a few rows are enough, and they go through every line."""
    return backend == "triton" and device == "cpu"


@contextmanager
def backend_in_use(operator: str, backend: str) -> Iterator[None]:
    """One backend, and uninitialised memory that is NaN: what a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        with kernels.prefer(operator, backend):
            assert torch.empty(3).isnan().all()
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def with_outliers(x: Tensor) -> Tensor:
    """x with a thousand times the usual size in a few channels, as large models have."""
    x = x.clone()
    x[..., :: max(x.shape[-1] // 3, 1)] *= 1000
    return x


def exact_rows(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Rows whose values times the weight are fp8 values times a power of two, 448 the largest:
    nothing is left to be rounded, where Triton's interpreter is wrong at fp8."""
    codes = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    x = codes[torch.randint(0, 126, (rows, cols))] * torch.randn(rows, cols).sign()
    x[:, 0] = 448
    weight = 2.0 ** torch.randint(-2, 3, (cols,))
    return x / weight * 2.0 ** torch.randint(-3, 4, (rows, 1)), weight
