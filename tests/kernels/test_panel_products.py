"""linear_int8 and linear_int4 on GPUs: the Triton kernels, interpreted, and integer products."""

import pytest
import torch

from internvl_engine import kernels, reference
from internvl_engine.kernels import (
    batch_invariant,
    dequantize_int4,
    dequantize_int8,
    linear_int4,
    linear_int8,
    quantize_int4,
    quantize_int8,
)
from internvl_engine.kernels.linear_int8 import linear_int8_int_mm

from kernel_runs import backend_in_use, with_outliers
from numerics import assert_as_accurate_as_eager, assert_written

EPILOGUES = ["none", "gelu", "gelu_tanh", "gelu_quick", "swiglu"]
interpreted = pytest.mark.skipif(
    "triton" not in kernels.backends("linear_int8")["CPU"], reason="triton is not interpreted here"
)
TILES = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2, "num_warps": 4, "num_stages": 1}


def in_8_bits(weight: torch.Tensor) -> tuple[tuple, torch.Tensor]:
    """(the arguments of linear_int8 behind x, the weight that they stand for)."""
    quantized = quantize_int8(weight)
    return quantized, dequantize_int8(*quantized[:2], weight.shape[1], weight.dtype)


def in_4_bits(weight: torch.Tensor, group: int = 64) -> tuple[tuple, torch.Tensor]:
    quantized = quantize_int4(weight, group)
    return (*quantized, weight.shape[0]), dequantize_int4(*quantized, *weight.shape, weight.dtype)


FORMS = {"linear_int8": (linear_int8, in_8_bits), "linear_int4": (linear_int4, in_4_bits)}
each_form = pytest.mark.parametrize("operator", FORMS)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles of rows, of features and of columns, in both directions."""
    for stem in FORMS:
        module = pytest.importorskip(f"internvl_engine.kernels.triton.{stem}")
        tables = module.Tables(*({"sm90": TILES},) * 4, candidates=([], []))
        monkeypatch.setattr(module, "TABLES", tables)


def inputs(operator, features, channels, dtype=torch.float32, rows=(2, 5)):
    x = torch.randn(*rows, channels).to(dtype)
    weight = (torch.randn(features, channels) * channels**-0.5).to(dtype)
    return x, *FORMS[operator][1](weight), torch.randn(features).to(dtype)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("epilogue", EPILOGUES)
@each_form
def test_triton_matches_the_widened_weight(operator, epilogue, dtype, small_tiles):
    """70 features end inside of a panel, `up` begins in one; 140 columns end inside of a group."""
    x, quantized, weight, bias = inputs(operator, 70, 140, dtype, (3, 7))
    width = 35 if epilogue == "swiglu" else 70
    residual = torch.randn(7, 3, width).to(dtype).transpose(0, 1)
    with backend_in_use(operator, "triton"):
        y = FORMS[operator][0](x, *quantized, bias, epilogue, residual)
    assert_written(y)
    assert y.is_contiguous()
    arguments = (x, weight, bias, epilogue, residual)
    assert_as_accurate_as_eager(y, reference.linear, *arguments, slack=1.3)


@interpreted
@pytest.mark.parametrize("shape", [(5, 7, (1,)), (33, 42, (4, 1)), (1, 320, (2,)), (96, 64, (0,))])
@each_form
def test_triton_in_its_own_tiles(operator, shape):
    features, channels, rows = shape
    x, quantized, weight, bias = inputs(operator, features, channels, torch.float32, rows)
    with backend_in_use(operator, "triton"):
        y = FORMS[operator][0](x, *quantized, bias)
    torch.testing.assert_close(y, reference.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


@interpreted
@each_form
def test_triton_keeps_the_small_values_of_a_row_with_outliers(operator, small_tiles):
    x, quantized, weight, _ = inputs(operator, 64, 128, torch.float16, (3,))
    x = with_outliers(x)
    with backend_in_use(operator, "triton"):
        y = FORMS[operator][0](x, *quantized)
    assert_as_accurate_as_eager(y, reference.linear, x, weight, None, "none", slack=1.3)


@interpreted
def test_triton_reads_groups_of_128_and_strided_x(small_tiles):
    x, weight = torch.randn(4, 3, 2, 200)[:, :, 1].transpose(0, 1), torch.randn(40, 200)
    quantized, dense = in_4_bits(weight, 128)
    with backend_in_use("linear_int4", "triton"):
        y = linear_int4(x, *quantized)
    torch.testing.assert_close(y, reference.linear(x, dense), rtol=1e-5, atol=1e-4)
    eight, dense = in_8_bits(weight)
    with backend_in_use("linear_int8", "triton"):
        y = linear_int8(x, *eight)
    torch.testing.assert_close(y, reference.linear(x, dense), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integer_products_of_quantized_rows(epilogue, dtype, monkeypatch):
    # In place of cuBLAS. A CPU with AVX2 only adds pairs of byte products in 16 bits: it saturates.
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.double() @ b.double()).int())
    x, quantized, weight, bias = inputs("linear_int8", 72, 136, dtype, (3, 7))
    residual = torch.randn(3, 7, 36 if epilogue == "swiglu" else 72).to(dtype)
    y = linear_int8_int_mm(x, *quantized, bias, epilogue, residual)
    q, scales = reference.quantize_rows(x, torch.int8)
    exact = reference.linear(
        q.double() * scales[..., None], dequantize_int8(*quantized[:2], 136, torch.float64),
        bias.double(), epilogue, residual.double(),
    )  # fmt: skip
    # The product, the activation and the sum are rounded to dtype, as eager does.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=2 * eps, atol=2 * eps * exact.abs().max())
    assert y.dtype == dtype and y.is_contiguous()


def test_integer_products_serve_what_cublas_takes():
    for features, channels, rows in ((72, 136, 16), (71, 136, 20), (72, 132, 20)):
        x, quantized, _, _ = inputs("linear_int8", features, channels, torch.float32, (rows,))
        assert linear_int8_int_mm(x, *quantized) is NotImplemented
    x, quantized, _, _ = inputs("linear_int8", 72, 136, torch.float32, (20,))
    assert linear_int8_int_mm(x, *quantized).shape == (20, 72)
    with batch_invariant():
        assert linear_int8_int_mm(x, *quantized) is NotImplemented


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5, 33, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@each_form
def test_a_gpu_matches_the_widened_weight(operator, dtype, rows):
    """In the defaults' tiles, of few rows and of many."""
    x, quantized, weight, bias = inputs(operator, 200, 330, dtype, (rows,))
    x, weight, bias = (tensor.cuda() for tensor in (with_outliers(x), weight, bias))
    quantized = [t.cuda() if isinstance(t, torch.Tensor) else t for t in quantized]
    for epilogue in EPILOGUES:
        residual = torch.randn(rows, 100 if epilogue == "swiglu" else 200, device="cuda").to(dtype)
        y = FORMS[operator][0](x, *quantized, bias, epilogue, residual)
        arguments = (x, weight, bias, epilogue, residual)
        assert_as_accurate_as_eager(y, reference.linear, *arguments, slack=1.3)
