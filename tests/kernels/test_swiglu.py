import pytest
import torch

from internvl_engine import reference
from internvl_engine.kernels import swiglu

from kernel_runs import backend_in_use, interpreted, runs, with_outliers
from numerics import assert_as_accurate_as_eager, assert_gradient_as_accurate_as_eager

RUNS = runs("swiglu")
# QLLaMA's width, one that is no multiple of a block or of a vector, one element, no rows.
SHAPES = [(96, 2 * 11008), (5, 2 * 1027), (2, 3, 2 * 41), (1, 2), (0, 64), (3, 0)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_is_as_accurate_as_eager(shape, device, backend, dtype):
    if interpreted(backend, device):
        shape = (min(shape[0], 2), *shape[1:])
    gate_up = torch.randn(shape, dtype=dtype, device=device).requires_grad_()
    with backend_in_use("swiglu", backend):
        assert_as_accurate_as_eager(swiglu(gate_up), reference.swiglu, gate_up)
        assert_gradient_as_accurate_as_eager(swiglu, reference.swiglu, gate_up)


@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_large_and_strange_values(device, backend, dtype):
    gate = torch.tensor([0.0, -0.0, 1e-4, 20.0, -20.0, 88.0, -88.0, 300.0, -300.0, 6e4, -6e4])
    gate_up = torch.stack([gate, torch.ones_like(gate)]).flatten().to(device, dtype)
    with backend_in_use("swiglu", backend):
        y = swiglu(gate_up)
        # e**-88 is below the smallest normal value: absolute, not relative, error counts there.
        torch.testing.assert_close(y, reference.swiglu(gate_up), atol=1e-30, rtol=1e-2)
        nan = torch.full((4, 2), float("nan"), dtype=dtype, device=device)
        assert swiglu(nan).isnan().all()
        outliers = with_outliers(torch.randn(3, 2 * 1024, dtype=dtype, device=device))
        if dtype != torch.float16:  # a product of two outliers is beyond float16
            assert_as_accurate_as_eager(swiglu(outliers), reference.swiglu, outliers)


@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_reads_strided_input_in_place_and_gives_the_same_bits_twice(device, backend, dtype):
    gate_up = torch.randn(2, 9, 300, dtype=dtype, device=device)[:, 1:5, 40:240].requires_grad_()
    grad = torch.randn(2, 4, 300, dtype=dtype, device=device)[..., 100:200]
    with backend_in_use("swiglu", backend):
        y = swiglu(gate_up)
        assert_as_accurate_as_eager(y, reference.swiglu, gate_up)
        assert_gradient_as_accurate_as_eager(swiglu, reference.swiglu, gate_up, grads=grad)
        first, second = (torch.autograd.grad(swiglu(gate_up), gate_up, grad) for _ in range(2))
        assert torch.equal(first[0], second[0]) and torch.equal(y, swiglu(gate_up))


def test_float64_goes_through_autograd_twice():
    gate_up = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, gate_up)
    assert torch.autograd.gradgradcheck(swiglu, gate_up)


def test_rejects_an_odd_width():
    with pytest.raises(ValueError, match=r"must be even, got \(2, 5\)"):
        swiglu(torch.randn(2, 5))
