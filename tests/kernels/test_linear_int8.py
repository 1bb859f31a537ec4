import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from int8_emulation import example, expected, largest_excess, rounds_rows

from internvl_engine import reference
from internvl_engine.kernels import _library, dequantize_int8, linear_int8, quantize_int8

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


native = pytest.mark.skipif(_library.native is None, reason="built without a C++ compiler")


@native
def test_is_the_product_of_what_it_rounds_to():
    assert largest_excess() <= 1


@native
@pytest.mark.parametrize("isa", ["avxvnni", "avx512", "portable"])
def test_every_instruction_set_computes_the_same(isa):
    """A process each; the tests beside this one run on the best set, and in CI on avx2 too."""
    script = Path(__file__).parents[1] / "int8_emulation.py"
    run = [sys.executable, script]
    environment = os.environ | {"INTERNVL_ISA": isa}
    found = subprocess.run(run, env=environment, check=True, capture_output=True, text=True).stdout
    if not json.loads(found):
        pytest.skip(f"this processor has no {isa}")
    name, excess, mixed = json.loads(found)
    assert name == isa and excess <= 1 and not mixed


def finished(product, bias, epilogue, residual):
    """The rest of a linear layer, in float64."""
    y = reference.EPILOGUES[epilogue](product + bias.double())
    return y if residual is None else residual.double() + y


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("epilogue", EPILOGUES)
# Whole panels of gate and up, and panels that hold rows of both.
@pytest.mark.parametrize("features, columns", [(128, 72), (34, 42)])
def test_epilogues(features, columns, epilogue, dtype):
    x, weight, bias = inputs(features, columns, dtype)
    packed, scales, sums = quantize_int8(weight)
    residual = torch.randn(2, 5, features // 2 if epilogue == "swiglu" else features).to(dtype)
    y = linear_int8(x, packed, scales, sums, bias, epilogue, residual)
    assert y.is_contiguous() and y.dtype == dtype
    product, allowed = expected(x.flatten(0, 1), packed, scales)
    wanted = finished(product.view(2, 5, -1), bias, epilogue, residual)
    # The product's error, at most 1.13 times as large behind an activation and times the other half
    # in SwiGLU; then each of its steps and the result round.
    largest = 1.13 * max(1.0, (product.abs().amax() + bias.abs().amax()).item())
    unit = torch.finfo(dtype).eps * (2 if dtype == torch.float32 else 1)
    steps = 8 if dtype == torch.float32 or epilogue == "swiglu" and features % 64 else 1
    atol = allowed.max().item() * 2 * largest + unit * steps * largest
    torch.testing.assert_close(y.double(), wanted, rtol=unit * steps, atol=atol)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# One row, one tile, one more than a tile, a whole image; the layout is the same for all.
@pytest.mark.parametrize("rows", [(), (0,), (1,), (3, 14), (15,), (257,)])
def test_any_number_of_rows(rows, dtype):
    x, weight, _ = inputs(130, 75, dtype, rows)
    packed, scales, sums = quantize_int8(weight)
    y = linear_int8(x, packed, scales, sums)
    assert y.shape == (*rows, 130) and y.dtype == dtype
    wanted, allowed = expected(x.reshape(-1, 75), packed, scales) if x.numel() else (y, y)
    rounding = torch.finfo(dtype).eps / 2 * wanted.abs()
    assert ((y.double() - wanted.view(y.shape)).abs() <= (allowed + rounding).view(y.shape)).all()


@pytest.mark.parametrize("rows, features, columns", [(5, 0, 8), (0, 32, 8), (5, 32, 0)])
def test_empty(rows, features, columns):
    form = quantize_int8(torch.randn(features, columns))
    bias = torch.randn(features)
    y = linear_int8(torch.randn(rows, columns), *form, bias)
    assert torch.equal(y, bias.expand(rows, features))


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_strided_x(dtype):
    x, weight, bias = inputs(96, 64, dtype, (6, 9, 3))
    form = quantize_int8(weight)
    columns = torch.randn(64, 10).to(dtype).t()
    slices = (x[:, :, 1], x[1:4, ::2, 2], x.transpose(0, 1)[..., 0, :], x.transpose(0, 1))
    for view in (*slices, columns):
        y = linear_int8(view, *form, bias)
        assert torch.equal(y, linear_int8(view.contiguous(), *form, bias))


@native
def test_a_weight_and_its_scales_may_lie_anywhere_in_a_file():
    """Mapped from a checkpoint, a tensor begins where the one before it ends."""
    x, weight, _ = inputs(40, 72)
    form = quantize_int8(weight)
    shifted = []
    for tensor in form:
        storage = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
        shifted.append(storage[1:].view(tensor.shape).copy_(tensor))
    assert torch.equal(linear_int8(x, *shifted), linear_int8(x, *form))


@native
@pytest.mark.parametrize("columns, channels", [(3200, 20), (12800, 3), (72, 2)])
def test_the_error_is_bounded_where_a_few_channels_are_a_thousand_times_as_large(columns, channels):
    """By half a step of x a product; the step is that of the ordinary channels."""
    torch.manual_seed(columns)
    x, weight = example(40, columns, channels), torch.randn(96, columns) * columns**-0.5
    form = quantize_int8(weight)
    dense = dequantize_int8(*form[:2], columns, torch.float64)
    truth, (_, roundings) = x.double() @ dense.t(), expected(x, *form[:2])
    ordinary = x.abs().kthvalue(columns - channels).values.double()
    step = ordinary / 127 if rounds_rows() else torch.zeros(40, dtype=torch.float64)
    bound = step[:, None] / 2 * dense.abs().sum(1) * (1 + 1e-6) + roundings
    error = linear_int8(x, *form).double() - truth
    assert (error.abs() <= bound).all()
    # As independent errors they are far smaller: evenly spread over a step, whose deviation is
    # 12**-0.5 steps.
    usual = step[:, None] / 12**0.5 * dense.norm(dim=1)
    assert error.norm() <= 1.1 * usual.norm() + roundings.norm()


@native
def test_more_outliers_than_are_taken_out_cost_accuracy_only():
    x, weight = example(8, 3200, 200), torch.randn(64, 3200)
    form = quantize_int8(weight)
    wanted, allowed = expected(x, *form[:2])
    y = linear_int8(x, *form).double()
    assert ((y - wanted).abs() <= allowed).all()
    truth = x.double() @ dequantize_int8(*form[:2], 3200, torch.float64).t()
    assert (y - truth).norm() <= 0.02 * truth.norm()


@native
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-20, 1e20])
def test_rows_of_any_size(size):
    """Of zeros too, whose scale would be 0, and of subnormal numbers, whose inverse is infinite."""
    x, weight, _ = inputs(33, 42)
    form = quantize_int8(weight)
    truth = (x * size).double() @ dequantize_int8(*form[:2], 42, torch.float64).t()
    y = linear_int8(x * size, *form).double()
    assert (y - truth).abs().max() <= 0.03 * truth.abs().max() + 1e-30


@native
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_gives_no_number_and_leaves_the_others_alone(value):
    x, weight, _ = inputs(33, 42, rows=(5,))
    form = quantize_int8(weight)
    before = linear_int8(x, *form)
    x[2, 7] = value
    y = linear_int8(x, *form)
    assert not y[2].isfinite().any()
    others = [0, 1, 3, 4]
    assert torch.equal(y[others], before[others])


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("epilogue", ["none", "swiglu"])
def test_a_row_has_the_same_bits_in_every_batch(epilogue, dtype):
    """One caption alone and among others, with and without outliers beside it."""
    # 3204 channels are more than a chain of sums; 192 features are panels of gate and up.
    weight, bias = torch.randn(192, 3204) / 57, torch.randn(192).to(dtype)
    x = example(300, 3204, 7).to(dtype)
    x[::2] = torch.randn(150, 3204).to(dtype)
    form = quantize_int8(weight)
    whole = linear_int8(x, *form, bias, epilogue)
    for rows in (1, 2, 3, 5, 15, 96, 257):  # decoding, tiles and parts of them, an image
        for first in (0, 300 - rows):
            some = slice(first, first + rows)
            assert torch.equal(linear_int8(x[some], *form, bias, epilogue), whole[some])


@native
@pytest.mark.parametrize("rows", [1, 40])
def test_gives_the_same_bits_on_every_number_of_threads(rows):
    x, weight, bias = inputs(200, 300, rows=(rows,))
    form = quantize_int8(weight)
    expected_bits = linear_int8(x, *form, bias, "gelu")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(linear_int8(x, *form, bias, "gelu"), expected_bits)
    finally:
        torch.set_num_threads(before)


def test_columns_of_which_int32_cannot_hold_the_sum():
    x, weight = torch.ones(1, 140_000), torch.ones(1, 140_000)
    y = linear_int8(x, *quantize_int8(weight))
    torch.testing.assert_close(y, torch.tensor([[140_000.0]]))


def test_a_residual_of_another_dtype_and_autocast():
    x, weight, bias = inputs(33, 42, torch.bfloat16)
    form = quantize_int8(weight)
    residual, y = torch.randn(2, 5, 33), linear_int8(x, *form, bias)
    assert torch.equal(linear_int8(x, *form, bias, residual=residual), residual + y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_int8(x.float(), *form, bias.float()), y)


def test_compiles_without_a_graph_break_and_with_rows_that_change():
    form = quantize_int8(torch.randn(64, 48))

    def layer(x):
        return linear_int8(x, *form, None, "gelu")

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in ((2, 5), (3, 7)):
        x = torch.randn(*rows, 48)
        assert torch.equal(compiled(x), layer(x))


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

    # That of the wide weight: x is rounded in the forward pass only.
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


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64])
def test_rejects_x_of_a_dtype_that_it_does_not_compute_in(dtype):
    form = quantize_int8(torch.randn(33, 64))
    with pytest.raises(ValueError, match=f"linear_int8: x must be .* float16, got {dtype}"):
        linear_int8(torch.ones(2, 64, dtype=dtype), *form)
    with pytest.raises(ValueError, match=r"x must be \(..., C\) .* of shape \(\)"):
        linear_int8(torch.tensor(1.0), *form)
