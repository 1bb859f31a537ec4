import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import library, nn

from internvl_engine import reference
from internvl_engine.kernels import (
    _library,
    batch_invariant,
    dequantize_int4,
    linear_int4,
    prefer,
    quantize_int4,
)

from numerics import assert_gradient_as_accurate_as_eager

# Whole panels, part of one, a last group that is part of a step, one row, several panels.
SHAPES = [(96, 64), (33, 42), (5, 7), (1, 320), (200, 130)]
EPILOGUES = ["none", "gelu", "gelu_tanh", "gelu_quick", "swiglu"]
DTYPES = [torch.float32, torch.bfloat16]
native = pytest.mark.skipif(_library.native is None, reason="built without a C++ compiler")


def inputs(features, channels, dtype=torch.float32, rows=(2, 5)):
    x = torch.randn(*rows, channels).to(dtype)
    weight = torch.randn(features, channels) * channels**-0.5
    return x, weight, torch.randn(features).to(dtype)


def whole_numbers(rows, channels, dtype, group=64):
    """x whose groups are 8 bits as they are: integers up to 127, times a power of two."""
    x = torch.randint(-127, 128, (rows, channels)).float()
    x[:, ::group] = 127
    scales = torch.randint(-3, 11, (rows, -(-channels // group)))
    return (x * (2.0**scales).repeat_interleave(group, 1)[:, :channels]).to(dtype)


def in_8_bits(x, group):
    """x as the kernel rounds it: every row and group of columns to 255 levels."""
    groups = F.pad(x.double(), (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    steps = groups.abs().amax(-1, keepdim=True).clamp(min=1e-300) / 127
    return ((groups / steps).round() * steps).flatten(-2)[..., : x.shape[-1]]


def assert_within(y, truth, relative):
    error = (y.double() - truth).norm() / truth.norm()
    assert error <= relative, f"error {error:.3e}, allowed {relative:.3e}"


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("shape", [*SHAPES, (64, 3200)])
def test_is_exact_for_what_8_bits_hold(shape, group, dtype):
    features, channels = shape
    packed, scales = quantize_int4(torch.randn(shape), group)
    weight = dequantize_int4(packed, scales, *shape, torch.float64)
    # One row, a tile, one more than a tile, several tiles.
    for rows in (1, 4, 5, 12, 13, 31):
        x = whole_numbers(rows, channels, dtype, group)
        y = linear_int4(x, packed, scales, features)
        truth = x.double() @ weight.t()
        # Groups are added in fp32, which rounds once a group, and the result is rounded to dtype.
        sizes = x.double().abs() @ weight.abs().t()
        allowed = 2**-23 * (2 + channels / group) * sizes + torch.finfo(dtype).eps * truth.abs()
        assert ((y.double() - truth).abs() <= allowed).all()


@native
@pytest.mark.parametrize("group", [64, 128])
def test_rounds_x_to_8_bits_a_group(group):
    x, weight, _ = inputs(200, 1000, rows=(40,))
    packed, scales = quantize_int4(weight, group)
    dense = dequantize_int4(packed, scales, 200, 1000, torch.float64)
    y = linear_int4(x, packed, scales, 200)
    assert_within(y, in_8_bits(x, group) @ dense.t(), 3e-5)  # a value may lie between two levels
    assert_within(y, x.double() @ dense.t(), 0.01)


@native
@pytest.mark.parametrize("channels", [[3, 1000, 2500], [64, 70, 127], list(range(5, 4096, 130))])
@pytest.mark.parametrize("rows", [1, 16])
def test_outlier_channels_cost_the_others_nothing(rows, channels):
    """A thousand times the usual size in a few channels, alone or together in a group."""
    x, weight, _ = inputs(256, 4096, rows=(rows,))
    packed, scales = quantize_int4(weight)
    dense = dequantize_int4(packed, scales, 256, 4096, torch.float64)
    usual = x.double() @ dense.t()
    x[:, channels] *= 1000
    y = linear_int4(x, packed, scales, 256)
    error = (y.double() - x.double() @ dense.t()).norm() / usual.norm()
    assert error <= 0.01, error  # of what the usual values add up to, not of the outliers' products


@native
def test_more_outliers_than_are_kept_apart():
    x, weight, _ = inputs(64, 4096, rows=(5,))
    x[:, 7::64] *= 1000  # one in each of 64 groups, 32 are
    packed, scales = quantize_int4(weight)
    dense = dequantize_int4(packed, scales, 64, 4096, torch.float64)
    assert_within(linear_int4(x, packed, scales, 64), x.double() @ dense.t(), 0.01)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("features", [128, 34, 96])
@pytest.mark.parametrize("with_bias, with_residual", [(False, False), (True, True)])
def test_matches_reference(features, epilogue, dtype, with_bias, with_residual):
    x, weight, bias = inputs(features, 130, dtype)
    width = features // 2 if epilogue == "swiglu" else features
    residual = torch.randn(2, 5, width).to(dtype) if with_residual else None
    bias = bias if with_bias else None
    packed, scales = quantize_int4(weight)
    dense = dequantize_int4(packed, scales, features, 130, torch.float64)
    y = linear_int4(x, packed, scales, features, bias, epilogue, residual)
    wide = [None if t is None else t.double() for t in (bias, residual)]
    truth = reference.linear(in_8_bits(x, 64), dense, wide[0], epilogue, wide[1])
    assert (y.dtype, y.is_contiguous()) == (dtype, True)
    # Rounded once to dtype; the reference, where it serves, does not round x.
    assert_within(y, truth, 1e-5 + torch.finfo(dtype).eps if _library.native else 0.01)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(), (0,), (1,), (3, 14), (257,)])
def test_any_number_of_rows(rows, dtype):
    x, weight, bias = inputs(130, 72, dtype, rows)
    packed, scales = quantize_int4(weight)
    y = linear_int4(x, packed, scales, 130, bias, "gelu")
    assert y.shape == (*rows, 130)
    if y.numel() > 0:
        dense = dequantize_int4(packed, scales, 130, 72, torch.float64)
        assert_within(y, reference.linear(x.double(), dense, bias.double(), "gelu"), 0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_strided_tensors(dtype):
    x, weight, bias = inputs(96, 64, dtype, (6, 9, 3))
    packed, scales = quantize_int4(weight)
    for view in (x[:, :, 1], x[1:4, ::2, 2], x.transpose(0, 1)[..., 0, :], x[..., 0, :].mT.mT):
        expected = linear_int4(view.contiguous(), packed, scales, 96, bias)
        assert torch.equal(linear_int4(view, packed, scales, 96, bias), expected)
    apart = [t.repeat_interleave(2, -1)[..., ::2] for t in (packed, scales)]
    assert torch.equal(linear_int4(x, *apart, 96, bias), linear_int4(x, packed, scales, 96, bias))
    residual = torch.randn(96, 6).to(dtype).t()
    found = linear_int4(x[:, 0, 0], packed, scales, 96, None, "none", residual)
    expected = linear_int4(x[:, 0, 0], packed, scales, 96, None, "none", residual.contiguous())
    assert torch.equal(found, expected)


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_a_row_has_the_same_bits_in_every_batch(epilogue, dtype):
    x, weight, bias = inputs(128, 3200, dtype, (300,))
    x[::7, 5::500] *= 1000
    packed, scales = quantize_int4(weight)
    whole = linear_int4(x, packed, scales, 128, bias, epilogue)
    for rows in (1, 2, 5, 12, 15, 96, 257):  # decoding, tiles and parts of them, an image
        for first in (0, 300 - rows):
            some = slice(first, first + rows)
            alone = linear_int4(x[some], packed, scales, 128, bias, epilogue)
            assert torch.equal(alone, whole[some])


def test_the_reference_keeps_the_promise_of_batch_invariance():
    x, weight, _ = inputs(40, 640, rows=(30,))
    packed, scales = quantize_int4(weight)
    with prefer("linear_int4", "reference"), batch_invariant():
        whole = linear_int4(x, packed, scales, 40)
        for row in range(30):
            alone = linear_int4(x[row : row + 1], packed, scales, 40)
            assert torch.equal(alone[0], whole[row])


@native
@pytest.mark.parametrize("dtype", DTYPES)
def test_gives_the_same_bits_on_every_number_of_threads(dtype):
    x, weight, bias = inputs(200, 300, dtype, (1100,))  # packed in two parts
    packed, scales = quantize_int4(weight)
    expected = linear_int4(x, packed, scales, 200, bias, "gelu")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(linear_int4(x, packed, scales, 200, bias, "gelu"), expected)
    finally:
        torch.set_num_threads(before)


WITHOUT_TORCH = """
import sys
import numpy
from internvl_engine import _native

x, packed, scales = (numpy.load(f"{sys.argv[1]}/{name}.npy") for name in ("x", "packed", "scales"))
rows, columns, features = *x.shape, 70
y = numpy.empty((rows, features), "float32")
workspace = numpy.empty(_native.linear_int4_workspace(rows, columns, 64, 1), "uint8")
_native.linear_int4(
    0, (x.ctypes.data, rows, 0, columns), (packed.ctypes.data, scales.ctypes.data, 64), 0,
    (0, 1, 0, 0), y.ctypes.data, rows, columns, features, 0, workspace.ctypes.data, 1,
)
numpy.save(f"{sys.argv[1]}/y.npy", y)
"""


@native
@pytest.mark.parametrize("isa", ["avx512vnni", "avx512", "avxvnni", "avx2", "portable"])
def test_every_instruction_set_gives_the_same(isa, tmp_path):
    x, weight, _ = inputs(70, 1000, rows=(17,))
    packed, scales = quantize_int4(weight)
    for name, tensor in (("x", x), ("packed", packed), ("scales", scales)):
        np.save(tmp_path / name, tensor.numpy())
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path)],
        env={**os.environ, "INTERNVL_ISA": isa}, capture_output=True, text=True,
    )  # fmt: skip
    if "this processor and this build have" in run.stderr:
        pytest.skip(f"no {isa} here")
    assert run.returncode == 0, run.stderr
    found = torch.from_numpy(np.load(tmp_path / "y.npy"))
    expected = linear_int4(x, packed, scales, 70)
    if "portable" in (isa, _library.native.instruction_set()):  # without fused multiply-adds
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)
    else:
        assert torch.equal(found, expected)


@native
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_its_row_only(value):
    x, weight, _ = inputs(40, 200, rows=(6,))
    packed, scales = quantize_int4(weight)
    expected = linear_int4(x, packed, scales, 40)
    x[2, 70] = value
    y = linear_int4(x, packed, scales, 40)
    assert not y[2].isfinite().any()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(y[others], expected[others])


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-20, 1e30])
def test_rows_of_any_size(size):
    x, weight, _ = inputs(40, 200, rows=(3,))
    packed, scales = quantize_int4(weight)
    y = linear_int4(x * size, packed, scales, 40)
    expected = linear_int4(x, packed, scales, 40) * size
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4 * size + 1e-36)


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_x_and_bias_have_gradients(epilogue):
    x, weight, bias = inputs(96, 64)
    form = quantize_int4(weight)
    dense = dequantize_int4(*form, 96, 64, torch.float64)
    residual = torch.randn(2, 5, 48 if epilogue == "swiglu" else 96)
    leaves = [t.requires_grad_() for t in (x, bias, residual)]

    def wide(x, bias, residual):
        return reference.linear(x, dense.to(x.dtype), bias, epilogue, residual)

    def with_int4(x, bias, residual):
        return linear_int4(x, *form, 96, bias, epilogue, residual)

    assert_gradient_as_accurate_as_eager(with_int4, wide, *leaves)


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.up_scales = map(nn.Buffer, quantize_int4(torch.randn(128, 64)))
        self.down, self.down_scales = map(nn.Buffer, quantize_int4(torch.randn(64, 64)))

    def forward(self, x):
        y = linear_int4(x, self.up, self.up_scales, 128, None, "swiglu")
        return linear_int4(y, self.down, self.down_scales, 64, residual=x)


def test_compiles_without_a_graph_break():
    model = TwoLayers()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in ((2, 5), (3, 7)):
            x = torch.randn(*rows, 64)
            assert torch.equal(compiled(x), model(x))


def test_under_autocast():
    x, weight, bias = inputs(96, 64)
    packed, scales = quantize_int4(weight)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear_int4(x, packed, scales, 96, bias)
    assert torch.equal(y, linear_int4(x.bfloat16(), packed, scales, 96, bias.bfloat16()))


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_is_a_wellformed_operator(epilogue):
    x, weight, bias = inputs(6, 8, rows=(3,))
    residual = torch.randn(3, 3 if epilogue == "swiglu" else 6)
    leaves = [tensor.requires_grad_() for tensor in (x, bias, residual)]
    arguments = (leaves[0], *quantize_int4(weight), 6, leaves[1], epilogue, leaves[2])
    library.opcheck(torch.ops.internvl.linear_int4.default, arguments)


def test_rejects_what_does_not_fit():
    x, weight, bias = inputs(33, 64)
    packed, scales = quantize_int4(weight)
    with pytest.raises(ValueError, match="a weight of 56 columns has uint8"):
        linear_int4(x[..., :56], packed, scales, 33)
    with pytest.raises(ValueError, match="scales .*, got torch.uint8 .* and torch.float32"):
        linear_int4(x, packed, scales.float(), 33)
    with pytest.raises(ValueError, match="65 features take 3 panels of 32 rows, got .* of 2"):
        linear_int4(x, packed, scales, 65)
    with pytest.raises(ValueError, match=r"bias must be torch.float32 of shape \(33,\)"):
        linear_int4(x, packed, scales, 33, bias[:32])
    with pytest.raises(ValueError, match="'swiglu' for 33 features"):
        linear_int4(x, packed, scales, 33, bias, "swiglu")
    with pytest.raises(ValueError, match=r"shape of the output, \(2, 5, 33\)"):
        linear_int4(x, packed, scales, 33, residual=x)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64])
def test_rejects_x_of_a_dtype_that_it_does_not_compute_in(dtype):
    form = quantize_int4(torch.randn(33, 64))
    with pytest.raises(ValueError, match=f"linear_int4: x must be .* float16, got {dtype}"):
        linear_int4(torch.ones(2, 64, dtype=dtype), *form, 33)
    with pytest.raises(ValueError, match=r"x must be \(..., C\) .* of shape \(\)"):
        linear_int4(torch.tensor(1.0), *form, 33)
