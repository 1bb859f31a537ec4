import pytest
import torch

from internvl_engine import kernels, reference
from internvl_engine.kernels import gelu_quant

from kernel_runs import backend_in_use, exact_rows, with_outliers

EPILOGUES = ["none", "gelu", "gelu_tanh", "gelu_quick", "swiglu"]
BACKENDS = kernels.backends("gelu_quant")["CPU"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_int8_is_within_half_a_step(dtype, epilogue, backend):
    x = with_outliers(torch.randn(2, 3, 66)).to(dtype)
    with backend_in_use("gelu_quant", backend):
        q, scales = gelu_quant(x, torch.int8, epilogue)
    wanted = reference.EPILOGUES[epilogue](x.float())
    assert q.shape == wanted.shape and q.is_contiguous() and q.dtype == torch.int8
    error = (q * scales[..., None] - wanted).abs()
    # The kernel's erf and exponential are their own, a few roundings of the largest value apart.
    assert (error <= scales[..., None] * 0.5001).all()
    assert (q.abs().amax(-1) == 127).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp8_rows_as_they_are(backend):
    x, weight = exact_rows(7, 40)
    x = x * weight  # codes of fp8 times a power of two
    with backend_in_use("gelu_quant", backend):
        q, scales = gelu_quant(x, torch.float8_e4m3fn, "none")
    assert torch.equal(q.float() * scales[:, None], x)


def test_fp8_of_an_activation():
    x = torch.randn(5, 64)
    q, scales = gelu_quant(x)
    wanted = torch.nn.functional.gelu(x)
    bound = wanted.abs() / 16 + scales[:, None] / 1024
    assert ((q.float() * scales[:, None] - wanted).abs() <= bound * 1.0001).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_rows_rows_of_zeros_and_none(backend):
    x = torch.randn(3, 2, 4, 24)[:, :, 1].transpose(0, 1)
    x[1, 1] = 0
    with backend_in_use("gelu_quant", backend):
        q, scales = gelu_quant(x, torch.int8)
        assert gelu_quant(x[:0], torch.int8)[1].shape == (0, 3)
    assert not q[1, 1].any() and scales[1, 1] == 1
    assert torch.equal(q, reference.gelu_quant(x, torch.int8)[0])


def test_rejects_what_it_does_not_know():
    with pytest.raises(ValueError, match="dtype must be one of"):
        gelu_quant(torch.randn(2, 8), torch.bfloat16)
    with pytest.raises(ValueError, match="epilogue must be in"):
        gelu_quant(torch.randn(2, 7), torch.int8, "swiglu")
