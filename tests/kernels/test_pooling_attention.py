import pytest
import torch

from internvl_engine import kernels, reference
from internvl_engine.kernels import pooling_attention

from kernel_runs import backend_in_use
from numerics import (
    assert_as_accurate_as_eager,
    assert_gradient_as_accurate_as_eager,
    assert_written,
)

EPS = 1e-5
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs it compiled")


def inputs(batch, heads, tokens, cols, dtype=torch.float32, device="cpu", outliers=0):
    x = torch.randn(batch, tokens, cols, device=device) + 0.3  # a mean for the LayerNorm to remove
    x[..., :outliers] *= 1000
    query = 2 * torch.randn(batch, heads, cols, device=device) * cols**-0.5
    return query.to(dtype), x.to(dtype), EPS


def check(*args) -> None:
    out = pooling_attention(*args)
    assert_written(out)
    assert_as_accurate_as_eager(out, reference.pooling_attention, *args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("outliers", [0, 2])
def test_matches_reference(dtype, outliers, device):
    check(*inputs(2, 16, 257, 320, dtype, device, outliers))


# 16 heads and odd widths; fewer heads than tl.dot takes rows; one token.
@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 16, 37, 200), (1, 3, 20, 48), (1, 16, 1, 130)])
@pytest.mark.parametrize("outliers", [0, 1])
def test_triton_interpreted(shape, dtype, outliers):
    with backend_in_use("pooling_attention", "triton"):
        check(*inputs(*shape, dtype, outliers=outliers))


@interpreted
def test_triton_weights_keep_more_than_sixteen_bits():
    """Eager keeps the softmax in fp32: weights of one rounding to fp16 would fail the rule."""
    with backend_in_use("pooling_attention", "triton"):
        query, x, _ = inputs(1, 16, 64, 128, torch.float16)
        check(query, x, EPS)
        tiny = x * 1e-3  # rstd of 1000
        check(query, tiny, EPS)


@interpreted
def test_triton_reads_a_slice():
    query, x, _ = inputs(3, 16, 30, 64)
    with backend_in_use("pooling_attention", "triton"):
        check(query[1:], x[1:, 5:22], EPS)
        check(query, x.mT.contiguous().mT, EPS)


def test_gradient(device):
    query, x, _ = inputs(2, 4, 9, 32, device=device)
    args = (query.requires_grad_(), x.requires_grad_(), EPS)
    assert_gradient_as_accurate_as_eager(pooling_attention, reference.pooling_attention, *args)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_empty(backend):
    if backend not in kernels.backends("pooling_attention")["CPU"]:
        pytest.skip("triton is not interpreted here")
    with kernels.prefer("pooling_attention", backend):
        query, x, _ = inputs(2, 4, 9, 32)
        assert pooling_attention(query[:0], x[:0]).shape == (0, 4, 32)


def test_rejects_what_does_not_fit():
    query, x, _ = inputs(2, 4, 9, 32)
    with pytest.raises(ValueError, match=r"query must be \(B, H, C\)"):
        pooling_attention(query, x[..., :31])
    with pytest.raises(ValueError, match="at least 1"):
        pooling_attention(query, x[:, :0])
