"""How weights become 4 bits: the layout, and that better rounding has less error."""

import pytest
import torch

from internvl_engine.kernels import dequantize_int4, quantize_int4, quantize_int4_calibrated

# Whole panels, part of one, a last group that is part of a step, one row, several panels.
SHAPES = [(96, 64), (33, 42), (5, 7), (1, 320), (200, 130)]


def held(form, shape, dtype=torch.float32):
    return dequantize_int4(*form, *shape, dtype)


def error(found, weight):
    return float((found - weight).norm() / weight.norm())


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_layout(shape, group):
    rows, columns = shape
    packed, scales = quantize_int4(torch.randn(shape), group)
    assert packed.shape == (-(-rows // 32), -(-columns // 8), 32, 4)
    assert scales.shape == (-(-rows // 32), -(-columns // group), 32)
    assert (packed.dtype, scales.dtype) == (torch.uint8, torch.float16)
    found = held((packed, scales), shape)
    for row, column in ((0, 0), (rows - 1, columns - 1), (rows // 2, columns // 2)):
        step, within = divmod(column, 8)
        byte = int(packed[row // 32, step, row % 32, within % 4])
        level = (byte & 15 if within < 4 else byte >> 4) - 8
        assert found[row, column] == level * scales[row // 32, column // group, row % 32].float()


def test_rows_and_columns_that_are_not_there_are_zero():
    packed, scales = quantize_int4(torch.ones(33, 5))
    levels = torch.cat((packed & 15, packed >> 4), 3).transpose(1, 2).reshape(64, 8)
    assert (levels[33:] == 8).all() and (levels[:, 5:] == 8).all()
    assert not scales.transpose(1, 2).reshape(64, 1)[33:].any()


@pytest.mark.parametrize("rounding", ["nearest", "search"])
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (40, 64)])
def test_zeros_and_nothing(shape, rounding):
    weight = torch.zeros(shape)
    assert torch.equal(held(quantize_int4(weight, 64, rounding), shape), weight)


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_nearest_is_half_a_step_away(shape, group):
    weight = torch.randn(shape)
    form = quantize_int4(weight, group, "nearest")
    steps = form[1].float().abs().transpose(1, 2).flatten(0, 1)[: shape[0]]
    steps = steps.repeat_interleave(group, 1)[:, : shape[1]]
    away = (held(form, shape) - weight).abs() / steps
    # The largest of the other sign is clipped to 7, and scales are rounded to 8 bits.
    assert away.max() <= 1 + 8 * 2**-8
    assert (away <= 0.5 + 8 * 2**-8).float().mean() > 0.95


@pytest.mark.parametrize("kind", ["normal", "laplace"])
def test_the_search_has_less_error_than_the_nearest(kind):
    weight = torch.randn(64, 1024)
    if kind == "laplace":
        weight = torch.distributions.Laplace(0.0, 1.0).sample((64, 1024))
    found = {r: error(held(quantize_int4(weight, 64, r), weight.shape), weight) for r in
             ("nearest", "search")}  # fmt: skip
    assert found["search"] < 0.97 * found["nearest"]
    largest = weight.view(64, -1, 64).abs().amax(2, keepdim=True)
    usual = (weight.view(64, -1, 64) / (largest / 7)).round() * (largest / 7)  # -7 .. 7
    assert found["search"] < 0.86 * error(usual.view(64, -1), weight)


def test_importance_moves_the_error_to_where_it_counts_less():
    weight, size = torch.randn(64, 1024), torch.rand(1024) * 10
    x = torch.randn(500, 1024) * size
    plain = held(quantize_int4(weight), weight.shape)
    weighted = held(quantize_int4(weight, importance=size.square()), weight.shape)
    assert error(x @ weighted.t(), x @ weight.t()) < 0.97 * error(x @ plain.t(), x @ weight.t())
    # All alike is no importance.
    alike = quantize_int4(weight, importance=torch.full((1024,), 2.0))
    assert torch.equal(alike[1], quantize_int4(weight)[1])


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("columns", [512, 300])
def test_feedback_halves_the_error_of_correlated_activations(columns, group):
    weight = torch.randn(70, columns)
    directions = torch.randn(20, columns)
    seen, unseen = (torch.randn(400, 20) @ directions for _ in range(2))
    seen, unseen = (x + 0.3 * torch.randn_like(x) for x in (seen, unseen))
    plain = held(quantize_int4(weight, group), weight.shape)
    calibrated = held(quantize_int4_calibrated(weight, seen, group), weight.shape)
    truth = unseen @ weight.t()
    assert error(unseen @ calibrated.t(), truth) < 0.5 * error(unseen @ plain.t(), truth)


def test_feedback_knows_channels_of_a_thousand_times_the_size_and_unused_ones():
    weight, x = torch.randn(40, 256), torch.randn(600, 256)
    x[:, 7] *= 1000
    x[:, 100] = 0
    plain = held(quantize_int4(weight), weight.shape)
    calibrated = held(quantize_int4_calibrated(weight, x), weight.shape)
    assert error(x @ calibrated.t(), x @ weight.t()) < error(x @ plain.t(), x @ weight.t())
    assert error(calibrated, weight) < 1.1 * error(plain, weight)


def test_without_correlations_feedback_is_the_search():
    weight = torch.randn(40, 128)
    calibrated = quantize_int4_calibrated(weight, torch.eye(128))
    assert torch.equal(held(calibrated, weight.shape), held(quantize_int4(weight), weight.shape))


@pytest.mark.parametrize("rounding", ["nearest", "search"])
def test_rows_that_fill_whole_panels_are_a_range_of_every_tensor(rounding):
    parts = [torch.randn(n, 130) for n in (64, 32, 40)]
    whole = quantize_int4(torch.cat(parts), 64, rounding)
    each = [quantize_int4(part, 64, rounding) for part in parts]
    for tensor, others in zip(whole, zip(*each, strict=True), strict=True):
        assert torch.equal(tensor, torch.cat(others))


@pytest.mark.parametrize("rounding", ["nearest", "search"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_4_bits_hold_stays(dtype, rounding):
    """Saved wide, loaded and quantized again, a model is the same."""
    weight = held(quantize_int4(torch.randn(70, 200), 64, rounding), (70, 200), dtype)
    assert torch.equal(held(quantize_int4(weight, 64, rounding), weight.shape, dtype), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_weight_and_any_strides(dtype):
    weight = torch.randn(130, 40).to(dtype).t()
    expected = quantize_int4(weight.float().contiguous())
    assert all(map(torch.equal, quantize_int4(weight), expected))
    found = dequantize_int4(*expected, 40, 130, dtype)
    assert torch.equal(found, dequantize_int4(*expected, 40, 130, torch.float32).to(dtype))


@pytest.mark.parametrize(
    "value, message",
    [
        (float("nan"), "the weight has NaN or infinite values"),
        (float("-inf"), "the weight has NaN or infinite values"),
        (-1e30, r"values up to 1e\+30, too large for a scale in float16, .* about 524,032"),
    ],
)
def test_refuses_weights_that_have_no_scale(value, message):
    weight = torch.randn(3, 8)
    weight[1, 2] = value
    with pytest.raises(ValueError, match=message):
        quantize_int4(weight)
    with pytest.raises(ValueError, match=message):
        quantize_int4_calibrated(weight, torch.randn(9, 8))


def test_refuses_what_does_not_fit():
    weight = torch.randn(3, 8)
    for wrong in (torch.randn(3), torch.ones(3, 8, dtype=torch.int8)):
        with pytest.raises(ValueError, match=r"floating weight \(F, C\)"):
            quantize_int4(wrong)
    with pytest.raises(ValueError, match=r"group in \(64, 128\), got .* and 32"):
        quantize_int4(weight, 32)
    with pytest.raises(ValueError, match="rounding in .*, got 'best'"):
        quantize_int4(weight, 64, "best")
    with pytest.raises(ValueError, match=r"importance \(8,\) or None, got .*\(7,\)"):
        quantize_int4(weight, importance=torch.ones(7))
    with pytest.raises(ValueError, match=r"finite activations \(..., 8\), got \(9, 7\)"):
        quantize_int4_calibrated(weight, torch.randn(9, 7))
