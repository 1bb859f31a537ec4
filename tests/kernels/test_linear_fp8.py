import pytest
import torch

from internvl_engine import reference
from internvl_engine.kernels import (
    _cuda,
    batch_invariant,
    dequantize_fp8,
    gelu_quant,
    linear,
    linear_fp8,
    linear_fp8_rows,
    quantize_fp8,
)
from internvl_engine.kernels.linear_fp8 import linear_fp8_scaled_mm

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


def emulated_scaled_mm(a, b, scale_a, scale_b, bias=None, out_dtype=None, use_fast_accum=False):
    """What torch._scaled_mm computes, with the layouts that it insists on."""
    assert a.is_contiguous() and b.t().is_contiguous() and use_fast_accum
    assert scale_a.shape == (a.shape[0], 1) and scale_b.shape == (1, b.shape[1])
    y = a.float() @ b.float() * scale_a * scale_b
    return (y if bias is None else y + bias).to(out_dtype)


@pytest.fixture
def gpu_with_fp8(monkeypatch):
    """What the launchers ask of a GPU, and its product."""
    monkeypatch.setattr(_cuda, "has_fp8", lambda device: True)
    monkeypatch.setattr(torch, "_scaled_mm", emulated_scaled_mm)


def rounding_of_rows(x, packed, scales):
    """The error that rows of x in fp8 may make in each product, by the sizes of its terms."""
    return (x.double().abs() @ (packed.double() * scales[:, None].double()).abs().t()) / 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_scaled_mm_is_the_product_of_quantized_rows(epilogue, dtype, gpu_with_fp8):
    x, (packed, scales), bias = inputs(32, 48, dtype)
    residual = torch.randn(2, 5, 16 if epilogue == "swiglu" else 32).to(dtype).transpose(0, 1)
    residual = residual.contiguous().transpose(0, 1)  # in another order of memory
    arguments = (packed, scales, bias, epilogue, residual)
    y = linear_fp8_scaled_mm(x, *arguments)
    assert y.dtype == dtype and y.is_contiguous()
    q, q_scales = reference.quantize_rows(x, torch.float8_e4m3fn)
    exact = reference.linear_fp8_rows(q.double(), q_scales.double(), packed.double(),
                                      scales.double(), torch.float64, bias.double(), epilogue,
                                      residual.double())  # fmt: skip
    # The product is rounded to bfloat16, then what eager rounds: 8 bits of mantissa, twice.
    torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=2**-7 * exact.abs().max())
    plain = linear_fp8_scaled_mm(x, packed, scales)
    error = (plain.double() - widened(x.double(), packed, scales)).abs()
    assert (error <= rounding_of_rows(x, packed, scales) * 1.1).all()


def test_scaled_mm_serves_what_its_units_take(gpu_with_fp8, monkeypatch):
    for features, channels, rows in ((24, 32, (3,)), (32, 24, (3,)), (32, 32, (0,))):
        x, quantized, _ = inputs(features, channels, torch.bfloat16, rows)
        assert linear_fp8_scaled_mm(x, *quantized) is NotImplemented
    x, quantized, _ = inputs(32, 32)
    with batch_invariant():
        assert linear_fp8_scaled_mm(x, *quantized) is NotImplemented
    monkeypatch.setattr(_cuda, "has_fp8", lambda device: False)
    assert linear_fp8_scaled_mm(x, *quantized) is NotImplemented


@pytest.mark.parametrize("dtype", DTYPES)
def test_pytorch_accepts_what_scaled_mm_is_given(dtype, monkeypatch):
    """Its own checks of shapes, strides and dtypes, of tensors without values."""
    monkeypatch.setattr(_cuda, "has_fp8", lambda device: True)
    # As if on a GPU: elsewhere the checks are left out.
    monkeypatch.setattr("torch._meta_registrations.device_hint", lambda tensor: "cuda")
    x = torch.empty(2, 5, 4, 48, dtype=dtype, device="meta")[:, :, 1]
    packed = torch.empty(32, 48, dtype=torch.float8_e4m3fn, device="meta")
    scales = torch.empty(32, device="meta")
    bias = torch.empty(32, dtype=dtype, device="meta")
    y = linear_fp8_scaled_mm(x, packed, scales, bias, "gelu")
    assert (y.shape, y.dtype) == ((2, 5, 32), dtype)
    with pytest.raises(RuntimeError):  # so they do run
        torch._scaled_mm(packed, packed.t().contiguous(), scales[:, None], scales[None])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_quantized_already(dtype):
    x, (packed, scales), bias = inputs(6, 8, dtype)
    residual = torch.randn(2, 5, 6).to(dtype)
    q, q_scales = gelu_quant(x)
    y = linear_fp8_rows(q, q_scales, packed, scales, dtype, bias, "gelu", residual)
    rounded = q.float() * q_scales[..., None]
    assert y.dtype == dtype
    torch.testing.assert_close(
        y.float(),
        widened(rounded, packed, scales, bias.float(), "gelu", residual.float()).to(dtype).float(),
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(3, 8)}, "q must be float8_e4m3fn"),
        ({"q_scales": torch.ones(2)}, r"q_scales float32 \(\.\.\.\)"),
        ({"scales": torch.ones(8)}, "scales must be float32"),
        ({"bias": torch.zeros(5)}, r"bias must be torch.float32 of shape \(6,\)"),
        ({"residual": torch.zeros(3, 6).half()}, "residual must be torch.float32"),
        ({"epilogue": "relu"}, "epilogue must be in"),
    ],
)
def test_says_what_does_not_fit_quantized_rows(change, message):
    x, (packed, scales), _ = inputs(6, 8, torch.float32, (3,))
    q, q_scales = gelu_quant(x, epilogue="none")
    arguments = {"q": q, "q_scales": q_scales, "packed": packed, "scales": scales}
    with pytest.raises(ValueError, match=message):
        linear_fp8_rows(**{**arguments, "dtype": torch.float32, **change})


def test_no_bit_of_a_row_depends_on_the_batch_with_the_switch():
    x, quantized, bias = inputs(32, 64, torch.float32, (7,))
    with batch_invariant():
        whole = linear_fp8(x, *quantized, bias, "gelu")
        for row in range(7):
            assert torch.equal(
                linear_fp8(x[row : row + 1], *quantized, bias, "gelu")[0], whole[row]
            )
    torch.testing.assert_close(whole, linear_fp8(x, *quantized, bias, "gelu"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"packed": torch.zeros(6, 8)}, "packed must be float8_e4m3fn"),
        ({"scales": torch.ones(8)}, r"scales must be float32 of shape \(6,\)"),
        ({"x": torch.zeros(3, 8, dtype=torch.int64)}, "linear_fp8: x must be .*got torch.int64"),
        (
            {"x": torch.zeros(3, 8, dtype=torch.bool)},
            "float32, bfloat16 or float16, got torch.bool",
        ),
        ({"x": torch.zeros(3, 8, dtype=torch.float64), "bias": None}, "got torch.float64"),
        ({"x": torch.zeros(())}, r"linear_fp8: x must be \(..., C\) .* of shape \(\)"),
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_quantizes_finite_weights_only(value):
    weight = torch.randn(3, 8)
    weight[1, 2] = value
    with pytest.raises(ValueError, match="quantize_fp8: the weight has NaN or infinite values"):
        quantize_fp8(weight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_multiplies_fp8_by_fp8(dtype):
    x, (packed, scales), bias = inputs(320, 640, dtype, (3, 257))
    x, packed, scales, bias = (tensor.cuda() for tensor in (x, packed, scales, bias))
    y = linear_fp8(x, packed, scales, bias)
    if not _cuda.has_fp8(x.device):
        assert_as_accurate_as_eager(y, widened, x, packed.to(dtype), scales, bias)
        return
    q, q_scales = gelu_quant(x, epilogue="none")
    exact = (q.double() * q_scales[..., None].double()) @ packed.double().t()
    exact = exact * scales.double() + bias.double()
    # bfloat16's rounding, and 14 bits of every 32 products that fast accumulation keeps.
    torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=2**-7 * exact.abs().max())
    rows = linear_fp8_rows(q, q_scales, packed, scales, dtype, bias)
    assert torch.equal(rows, y)
