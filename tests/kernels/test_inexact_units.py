"""float32 on the arithmetic of a GPU, whose `/` and exponentials are not rounded as IEEE has it.

The interpreter computes them exactly, so a kernel may be as accurate as eager there and not on a
GPU. Here the interpreter errs as PTX's div.full.f32 and ex2.approx.ftz.f32 may, by up to a unit in
the last place beyond the rounding of the result; eager stays exact.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the GPU has its own errors", allow_module_level=True)

from triton.runtime.interpreter import InterpreterBuilder

from internvl_engine import kernels, reference

from kernel_runs import backend_in_use
from numerics import assert_as_accurate_as_eager, assert_gradient_as_accurate_as_eager

EPS = 1e-6


def off(x: np.ndarray, units: float) -> np.ndarray:
    """float32 values with relative errors of up to `units`, a fixed function of their bits."""
    if x.dtype != np.float32:
        return x
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    error = (bits * np.uint64(2654435761) >> np.uint64(7)) % np.uint64(65536) / 32768.0 - 1.0
    return (x * (1 + units * 2.0**-23 * error.reshape(x.shape))).astype(np.float32)


def divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x * off(np.reciprocal(y), 0.5) if x.dtype == np.float32 else x / y


def exp(x: np.ndarray) -> np.ndarray:
    return off(np.exp2(x * np.float32(np.log2(np.e))), 1.0) if x.dtype == np.float32 else np.exp(x)


@pytest.fixture(autouse=True)
def inexact_units(monkeypatch):
    builder = InterpreterBuilder
    for name, run in (("exp", exp), ("exp2", lambda x: off(np.exp2(x), 1.0))):
        monkeypatch.setattr(
            builder, f"create_{name}", lambda self, x, run=run: self.unary_op(x, run)
        )
    monkeypatch.setattr(builder, "create_fdiv", lambda self, x, y: self.binary_op(x, y, divide))


def floats(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def heads(*positions: int) -> list[torch.Tensor]:
    return floats(*((2, 2, n, 24) for n in positions))


CASES = {
    "rms_norm": lambda: (*floats((256, 41), (41,)), EPS),
    "add_rms_norm": lambda: (*floats((256, 41), (256, 41), (41,), (41,)), EPS),
    "layer_norm": lambda: (*floats((256, 41), (41,), (41,)), EPS),
    "add_layer_norm": lambda: (*floats((256, 41), (256, 41), (41,), (41,), (41,)), EPS),
    "swiglu": lambda: floats((256, 82)),
    "linear": lambda: (*floats((256, 41), (82, 41), (82,)), "swiglu"),
    "attention": lambda: (*heads(64, 64, 64), "causal"),
    "qk_norm_attention": lambda: (*floats((1, 50, 3, 2, 24), (48,), (48,)), EPS),
}


NORMS = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm")
SLACK = dict.fromkeys(NORMS, 1.05)


@pytest.mark.parametrize("operator", CASES)
def test_is_as_accurate_as_eager_all_the_same(operator):
    args = CASES[operator]()
    run, expected = getattr(kernels, operator), getattr(reference, operator)
    with backend_in_use(operator, "triton"):
        slack = SLACK.get(operator, 1.25)
        assert_as_accurate_as_eager(run(*args), expected, *args, slack=slack)
        assert_gradient_as_accurate_as_eager(run, expected, *args)


@pytest.mark.parametrize("operator", ["pooling_attention", "decode_attention"])
def test_without_a_gradient(operator):
    args = (torch.randn(2, 3, 82) / 9, torch.randn(2, 70, 82), EPS)
    if operator == "decode_attention":
        args = (*(torch.randn(2, 2, n, 24) for n in (1, 70, 70)), torch.tensor([70, 33]))
    with backend_in_use(operator, "triton"):
        actual = getattr(kernels, operator)(*args)
    assert_as_accurate_as_eager(actual, getattr(reference, operator), *args)
