import pytest
import torch

from internvl_engine import reference
from internvl_engine.kernels import dequantize_fp8, linear, linear_fp8, quantize_fp8

from numerics import assert_as_accurate_as_eager

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPILOGUES = ["none", "gelu", "gelu_tanh", "gelu_quick", "swiglu"]


def inputs(features, channels, dtype=torch.bfloat16, rows=(2, 5)):
    x = torch.randn(*rows, channels).to(dtype)
    weight = torch.randn(features, channels) * channels**-0.5
    return x, quantize_fp8(weight), torch.randn(features).to(dtype)


def widened(x, packed, scales, *arguments):
    """The same product in the dtype of x, so that float64 gives the truth."""
    weight = packed.to(x.dtype) * scales.to(x.dtype)[:, None]
    return reference.linear(x, weight, *arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_is_within_half_a_step(dtype):
    weight = torch.randn(7, 33).to(dtype)
    weight[2] = 0
    weight[3, 5] *= 1000  # an outlier takes the resolution of its row only
    packed, scales = quantize_fp8(weight.t().contiguous().t())
    assert packed.is_contiguous()
    assert (packed.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
    dense = dequantize_fp8(packed, scales, torch.float32)
    # Three bits of mantissa: half of 2**-3 of the value, below 2**-6 half of 2**-9 of the scale.
    bound = torch.maximum(weight.float().abs() * 2**-4, scales[:, None] * 2**-10)
    assert ((dense - weight.float()).abs() <= bound * 1.0001).all()
    assert torch.equal(packed.float().abs().amax(1), torch.tensor([448.0] * 2 + [0] + [448] * 4))
    assert scales[2] == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("with_bias, with_residual", [(False, False), (True, True)])
def test_matches_the_widened_weight(epilogue, dtype, with_bias, with_residual):
    x, (packed, scales), bias = inputs(34, 42, dtype)
    width = 17 if epilogue == "swiglu" else 34
    arguments = (
        bias if with_bias else None,
        epilogue,
        torch.randn(2, 5, width).to(dtype) if with_residual else None,
    )
    y = linear_fp8(x, packed, scales, *arguments)
    assert y.is_contiguous()
    assert_as_accurate_as_eager(y, widened, x, packed.to(dtype), scales, *arguments)


def test_outliers_in_half_precision_do_not_overflow():
    x, (packed, scales), _ = inputs(8, 64, torch.float16)
    x[..., ::21] *= 1000
    y = linear_fp8(x, packed, scales)
    truth = widened(x.double(), packed, scales)
    torch.testing.assert_close(y.double(), truth, rtol=2**-10, atol=2**-10 * truth.abs().max())


@pytest.mark.parametrize("rows", [(), (0,), (3, 0)])
def test_any_number_of_rows(rows):
    x, quantized, bias = inputs(6, 8, torch.float32, rows)
    y = linear_fp8(x, *quantized, bias, "gelu")
    assert y.shape == (*rows, 6)
    torch.testing.assert_close(y, widened(x, *quantized, bias, "gelu"))


def test_gradients():
    x, (packed, scales), bias = inputs(6, 8, torch.float32)
    x.requires_grad_()
    bias.requires_grad_()
    residual = torch.randn(2, 5, 6, requires_grad=True)
    leaves = (x, bias, residual)
    ours = torch.autograd.grad(
        linear_fp8(x, packed, scales, bias, "gelu", residual).square().sum(), leaves
    )
    weight = dequantize_fp8(packed, scales, torch.float32)
    wanted = torch.autograd.grad(linear(x, weight, bias, "gelu", residual).square().sum(), leaves)
    for mine, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine, other)


def test_follows_autocast():
    x, (packed, scales), bias = inputs(6, 8, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear_fp8(x, packed, scales, bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, linear_fp8(x.bfloat16(), packed, scales, bias.bfloat16()))


def test_compiles():
    x, (packed, scales), bias = inputs(6, 8, torch.float32)
    run = torch.compile(
        lambda x: linear_fp8(x, packed, scales, bias, "gelu"), fullgraph=True, backend="eager"
    )
    assert torch.equal(run(x), linear_fp8(x, packed, scales, bias, "gelu"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"packed": torch.zeros(6, 8)}, "packed must be float8_e4m3fn"),
        ({"scales": torch.ones(8)}, r"scales must be float32 of shape \(6,\)"),
        ({"x": torch.zeros(3, 9)}, r"x must be torch.float32 of shape \(\.\.\., 8\)"),
        ({"bias": torch.zeros(5)}, r"bias must be torch.float32 of shape \(6,\)"),
        ({"epilogue": "relu"}, "epilogue must be in"),
        ({"residual": torch.zeros(6)}, "residual must have the shape"),
    ],
)
def test_says_what_does_not_fit(change, message):
    x, (packed, scales), bias = inputs(6, 8, torch.float32, (3,))
    arguments = {"x": x, "packed": packed, "scales": scales, "bias": bias, **change}
    with pytest.raises(ValueError, match=message):
        linear_fp8(**arguments)


@pytest.mark.parametrize("weight", [torch.zeros(3), torch.zeros(2, 2, dtype=torch.int8)])
def test_quantizes_matrices_only(weight):
    with pytest.raises(ValueError, match=r"quantize_fp8: weight must be \(F, C\)"):
        quantize_fp8(weight)
