import pytest
import torch

from internvl_engine import kernels, reference
from internvl_engine.kernels import rms_norm, rms_norm_quant

from kernel_runs import backend_in_use, exact_rows, with_outliers

KINDS = [torch.int8, torch.float8_e4m3fn]
EPS = 1e-6
BACKENDS = kernels.backends("rms_norm_quant")["CPU"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_rms_norm(kind, backend):
    """Within half a step of the largest value of the row, or of the value in fp8."""
    if (backend, kind) == ("triton", torch.float8_e4m3fn):
        pytest.skip("the interpreter loses a carry where it rounds to fp8")
    x, weight = with_outliers(torch.randn(2, 3, 330)), torch.rand(330) + 0.5
    with backend_in_use("rms_norm_quant", backend):
        q, scales = rms_norm_quant(x, weight, EPS, kind)
    assert (q.shape, q.dtype, scales.shape, scales.dtype) == (
        x.shape, kind, x.shape[:-1], torch.float32,
    )  # fmt: skip
    wanted = rms_norm(x, weight, EPS)
    step = scales[..., None] if kind == torch.int8 else wanted.abs() / 8 + scales[..., None] / 512
    assert ((q.float() * scales[..., None] - wanted).abs() <= step * 0.5001).all()
    largest = reference.largest_code(kind)
    assert (q.float().abs().amax(-1) == largest).all()


@pytest.mark.skipif("triton" not in BACKENDS, reason="triton is not interpreted here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cols", [16, 40, 330])
def test_triton_interpreted(cols, kind, dtype):
    x, weight = exact_rows(5, cols)
    if kind == torch.int8:
        x, weight = with_outliers(torch.randn(5, cols)), torch.rand(cols)
    x, weight = x.to(dtype), weight.to(dtype)
    with backend_in_use("rms_norm_quant", "triton"):
        q, scales = rms_norm_quant(x, weight, EPS, kind)
    expected, expected_scales = reference.rms_norm_quant(x, weight, EPS, kind)
    assert torch.equal(q.float(), expected.float())
    torch.testing.assert_close(scales, expected_scales, rtol=3e-7, atol=0)  # two roundings


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_rows_rows_of_zeros_and_none(backend):
    x = torch.randn(3, 2, 4, 24)[:, :, 1].transpose(0, 1)
    x[1, 1] = 0
    with backend_in_use("rms_norm_quant", backend):
        q, scales = rms_norm_quant(x, torch.ones(24), EPS, torch.int8)
        assert rms_norm_quant(x[:0], torch.ones(24), EPS)[0].shape == (0, 3, 24)
    assert q.is_contiguous() and not q[1, 1].any() and scales.isfinite().all()
    expected = reference.rms_norm_quant(x, torch.ones(24), EPS, torch.int8)
    assert torch.equal(q, expected[0])


def test_half_precision_outliers_do_not_overflow():
    x = torch.full((1, 64), 60000.0, dtype=torch.float16)
    q, scales = rms_norm_quant(x, torch.ones(64, dtype=torch.float16) * 4, EPS, torch.int8)
    torch.testing.assert_close(q * scales[:, None], torch.full((1, 64), 4.0))


def test_rejects_other_dtypes_and_gradients():
    x, weight = torch.randn(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match="dtype must be one of"):
        rms_norm_quant(x, weight, EPS, torch.uint8)
    with pytest.raises(ValueError, match="weight must be"):
        rms_norm_quant(x, weight[:4])
    with pytest.raises(ValueError, match="no gradient through what it rounds"):
        rms_norm_quant(x.requires_grad_(), weight)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gpu_rounds_as_the_reference(kind, dtype):
    """But for ties, which the last bit of an intermediate product decides."""
    x, weight = with_outliers(torch.randn(300, 3200)).to(dtype), torch.rand(3200).to(dtype)
    q, scales = rms_norm_quant(x.cuda(), weight.cuda(), EPS, kind)
    expected, expected_scales = reference.rms_norm_quant(x, weight, EPS, kind)
    torch.testing.assert_close(scales.cpu(), expected_scales, rtol=1e-6, atol=0)
    assert (q.float().cpu() != expected.float()).float().mean() < 1e-3
