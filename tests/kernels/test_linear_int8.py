import pytest
import torch

from internvl_engine import reference
from internvl_engine.kernels import dequantize_int8, linear_int8, quantize_int8

from numerics import assert_gradient_as_accurate_as_eager

# Whole panels, part of one, no whole step, one row and column, more than one panel and a part.
SHAPES = [(96, 64), (33, 42), (1, 1), (2, 3200), (200, 18)]
EPILOGUES = ["none", "gelu", "gelu_tanh", "gelu_quick", "swiglu"]


def inputs(features, channels, dtype=torch.float32, rows=(2, 5)):
    x = torch.randn(*rows, channels).to(dtype)
    weight = (torch.randn(features, channels) * channels**-0.5).to(dtype)
    return x, weight, torch.randn(features).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_row_is_rounded_to_the_nearest_of_its_255_levels(shape, dtype):
    weight = inputs(*shape, dtype)[1]
    packed, scales, sums = quantize_int8(weight)
    features, columns = shape
    assert packed.shape == (-(-features // 32), -(-columns // 4), 32, 4)
    assert (packed.dtype, scales.dtype, sums.dtype) == (torch.int8, torch.float32, torch.int32)
    dense = dequantize_int8(packed, scales, columns, torch.float32)
    largest = weight.float().abs().amax(1)
    assert torch.equal(scales, largest / 127)
    # Half a level, and the roundings of q * scale and of the quotient.
    allowed = (0.5 + 127 * 2**-22) * scales[:, None]
    assert ((dense - weight.float()).abs() <= allowed).all()
    q = (dense.double() / scales[:, None].double()).round()
    assert torch.equal(q.sum(1).int(), sums)
    assert torch.equal(dequantize_int8(packed, scales, columns, dtype), dense.to(dtype))


def test_columns_and_rows_that_are_not_there_are_zero():
    packed, _, _ = quantize_int8(torch.ones(33, 5))
    rows = packed.transpose(1, 2).reshape(64, 8)
    assert torch.equal(rows[:33, :5], torch.full((33, 5), 127, dtype=torch.int8))
    assert not rows[33:].any() and not rows[:, 5:].any()


def test_a_row_of_zeros_stays_so():
    weight = torch.randn(3, 8)
    weight[1] = 0
    packed, scales, sums = quantize_int8(weight)
    assert scales[1] == 0 and sums[1] == 0
    assert not dequantize_int8(packed, scales, 8, torch.float32)[1].any()


def test_rows_that_fill_whole_panels_are_a_range_of_every_tensor():
    parts = [torch.randn(n, 18) for n in (64, 32, 40)]
    whole = quantize_int8(torch.cat(parts))
    for tensor, others in zip(whole, zip(*map(quantize_int8, parts), strict=True), strict=True):
        assert torch.equal(tensor, torch.cat(others))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_refuses_weights_that_are_not_finite(value):
    weight = torch.randn(3, 8)
    weight[1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_int8(weight)


def test_refuses_what_is_not_a_floating_matrix():
    for weight in (torch.randn(3), torch.ones(3, 8, dtype=torch.int8)):
        with pytest.raises(ValueError, match=r"floating weight \(F, C\)"):
            quantize_int8(weight)


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_x_and_bias_have_gradients(epilogue):
    x, weight, bias = inputs(96, 64)
    form = quantize_int8(weight)
    dense = dequantize_int8(*form[:2], 64, torch.float64)
    residual = torch.randn(2, 5, 48 if epilogue == "swiglu" else 96)
    leaves = [t.requires_grad_() for t in (x, bias, residual)]

    def wide(x, bias, residual):
        return reference.linear(x, dense.to(x.dtype), bias, epilogue, residual)

    def with_int8(x, bias, residual):
        return linear_int8(x, *form, bias, epilogue, residual)

    assert_gradient_as_accurate_as_eager(with_int8, wide, *leaves)


def test_rejects_what_does_not_fit():
    x, weight, bias = inputs(33, 64)
    packed, scales, sums = quantize_int8(weight)
    with pytest.raises(ValueError, match=r"weight \(33, 60\) is packed as torch.int8 of shape"):
        linear_int8(x[..., :60], packed, scales, sums)
    with pytest.raises(ValueError, match=r"weight \(65, 64\) is packed as"):
        linear_int8(x, packed, torch.ones(65), torch.ones(65, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"scales torch.float32 \(F,\) and sums torch.int32"):
        linear_int8(x, packed, scales.double(), sums)
    with pytest.raises(ValueError, match=r"scales torch.float32 \(F,\) and sums torch.int32"):
        linear_int8(x, packed, scales, sums[:32])
    with pytest.raises(ValueError, match=r"bias must be torch.float32 of shape \(33,\)"):
        linear_int8(x, packed, scales, sums, bias[:32])
    with pytest.raises(ValueError, match="'swiglu' for 33 features"):
        linear_int8(x, packed, scales, sums, bias, "swiglu")
    with pytest.raises(ValueError, match=r"shape of the output, \(2, 5, 33\)"):
        linear_int8(x, packed, scales, sums, residual=x)
    with pytest.raises(ValueError, match="dequantize_int8: a weight"):
        dequantize_int8(packed, scales, 60, torch.float32)
