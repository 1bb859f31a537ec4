import pytest
import torch
from gemv_cases import DTYPES, FORMS, dense, weight_in
from host_gpu import host_gpu, needs_compiler

from internvl_engine import kernels
from internvl_engine.kernels import _decoding, linear_squares
from internvl_engine.kernels.linear_squares import linear_squares_cuda

from numerics import assert_as_accurate_as_eager

# (rows, C, F): features that are no whole 16, tiles or panels; a few; several tiles a block.
SHAPES = [(1, 264, 168), (8, 40, 9), (3, 520, 116)]


def run_cuda(x, parts, features, bias=None, residual=None):
    return linear_squares_cuda(x, *(*parts, None, None)[:3], features, bias, residual)


def truth(form, parts, features):
    """The reference as a function of x, bias and residual, whose weight follows their dtype."""

    def run(x, bias, residual):
        weight = dense(form, parts, features, x.shape[-1], x.dtype)
        return _decoding.linear_squares(x, weight, bias, residual)[0]

    return run


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_the_cuda_kernel_is_as_accurate_as_eager(form, dtype, shape):
    rows, columns, features = shape
    x, weight = torch.randn(rows, columns).to(dtype), torch.randn(features, columns).to(dtype)
    parts, residual = weight_in(form, weight), torch.randn(rows, features).to(dtype)
    for bias, onto in ((None, residual), (torch.randn(features).to(dtype), None)):
        with host_gpu() as gpu:
            y, squares = run_cuda(x, parts, features, bias, onto)
        assert gpu.calls == 1
        assert_as_accurate_as_eager(y, truth(form, parts, features), x, bias, onto)
        expected = _decoding.sums_of_squares(y)  # of what was stored
        torch.testing.assert_close(squares, expected, rtol=1e-6, atol=0)  # 16 terms in fp32


@needs_compiler
def test_the_residual_may_be_written_late():
    x, weight = torch.randn(2, 128).bfloat16(), torch.randn(48, 128).bfloat16()
    residual = torch.randn(2, 48).bfloat16()
    with host_gpu():
        expected = run_cuda(x, (weight,), 48, None, residual)
    hole = torch.full_like(residual, float("nan"))
    with host_gpu(arrives=(hole, residual)):
        found = run_cuda(x, (weight,), 48, None, hole)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("backend", kernels.backends("linear_squares")["CPU"])
def test_every_backend_of_the_cpu(backend):
    x, weight, residual = torch.randn(2, 3, 64), torch.randn(40, 64), torch.randn(2, 3, 40)
    with kernels.prefer("linear_squares", backend):
        found = linear_squares(x, (weight,), 40, None, residual)
    torch.testing.assert_close(found, _decoding.linear_squares(x, weight, None, residual))
    assert found[1].shape == (2, 3, 3)
    torch.testing.assert_close(found[1].sum(-1), found[0].square().sum(-1))


def test_rejects_what_does_not_fit():
    x, weight = torch.randn(3, 64), torch.randn(40, 64)
    with pytest.raises(ValueError, match=r"linear_squares: a weight \(41, 64\)"):
        linear_squares(x, (weight,), 41)
    with pytest.raises(ValueError, match="residual must be torch.float32"):
        linear_squares(x, (weight,), 40, residual=torch.zeros(3, 40).double())
    with pytest.raises(ValueError, match="residual must have the shape"):
        linear_squares(x, (weight,), 40, residual=torch.zeros(3, 41))
