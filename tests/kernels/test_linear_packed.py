import copy
import pickle

import pytest
import torch
from torch import library

from internvl_engine import reference
from internvl_engine.kernels import PackedWeight, can_pack, linear_packed

from numerics import assert_as_accurate_as_eager, assert_gradient_as_accurate_as_eager

# A block of the layout, one odd in both, a single element, one row, more rows than any block.
SHAPES = [(96, 64), (33, 41), (1, 1), (1, 3200), (200, 17)]
DTYPES = [
    dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if can_pack(torch.zeros(2, 2, dtype=dtype))
]


def inputs(features, channels, dtype=torch.bfloat16, rows=(2, 5)):
    x = torch.randn(*rows, channels).to(dtype)
    weight = (torch.randn(features, channels) * channels**-0.5).to(dtype)
    return x, weight, torch.randn(features).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gives_the_dense_weight_back(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    weight.view(-1)[0] = float("nan")
    weight.view(-1)[-1] = -0.0
    bits = {2: torch.int16, 4: torch.int32}[weight.element_size()]
    packed = PackedWeight(weight)
    for copied in (packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert (copied.shape, copied.dtype) == (weight.shape, dtype)
        assert torch.equal(copied.dense().view(bits), weight.view(bits))


def test_a_copy_has_its_own_weight_and_the_dense_one_is_not_kept():
    weight = torch.randn(96, 64).bfloat16()
    expected = weight.clone()
    packed = PackedWeight(weight)
    weight.zero_()
    packed.dense().zero_()
    assert torch.equal(packed.dense(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_a_strided_weight(dtype):
    merged = torch.randn(96, 3 * 64).to(dtype)
    for weight in (merged[:, 64:128], merged[32:64], merged.t()):
        assert torch.equal(PackedWeight(weight).dense(), weight)


def test_takes_the_bytes_of_the_dense_weight():
    weight = torch.empty(9600, 3200, dtype=torch.bfloat16)
    assert PackedWeight(weight).nbytes == weight.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", ["none", "gelu", "swiglu"])
@pytest.mark.parametrize("shape", [(96, 64), (34, 41), (2, 1), (640, 3200)])
@pytest.mark.parametrize("with_bias, with_residual", [(False, False), (True, True)])
def test_matches_reference(shape, epilogue, dtype, with_bias, with_residual):
    x, weight, bias = inputs(*shape, dtype)
    width = shape[0] // 2 if epilogue == "swiglu" else shape[0]
    residual = torch.randn(2, 5, width).to(dtype) if with_residual else None
    bias = bias if with_bias else None
    y = linear_packed(x, PackedWeight(weight), bias, epilogue, residual)
    assert y.is_contiguous()
    assert_as_accurate_as_eager(y, reference.linear, x, weight, bias, epilogue, residual)


@pytest.mark.parametrize("dtype", DTYPES)
# One row, one tile, one more than a tile, a whole image; the layout is the same for all.
@pytest.mark.parametrize("rows", [(), (0,), (1,), (3, 14), (15,), (257,)])
def test_any_number_of_rows(rows, dtype):
    x, weight, bias = inputs(130, 72, dtype, rows)
    y = linear_packed(x, PackedWeight(weight), bias, "gelu")
    assert y.shape == (*rows, 130)
    if y.numel() > 0:
        assert_as_accurate_as_eager(y, reference.linear, x, weight, bias, "gelu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_channels(dtype):
    bias = torch.randn(8).to(dtype)
    weight = PackedWeight(torch.empty(8, 0, dtype=dtype))
    y = linear_packed(torch.empty(3, 0, dtype=dtype), weight, bias)
    assert torch.equal(y, bias.expand(3, -1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_strided_x(dtype):
    x, weight, bias = inputs(96, 64, dtype, (6, 9, 3))
    for view in (x[:, :, 1], x[1:4, ::2, 2], x.transpose(0, 1)[..., 0, :], x.transpose(0, 1)):
        y = linear_packed(view, PackedWeight(weight), bias)
        assert_as_accurate_as_eager(y, reference.linear, view, weight, bias)
    columns = torch.randn(64, 10).to(dtype).t()
    y = linear_packed(columns, PackedWeight(weight))
    assert_as_accurate_as_eager(y, reference.linear, columns, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", ["none", "gelu", "swiglu"])
def test_outlier_channels(epilogue, dtype):
    x, weight, bias = inputs(96, 512, dtype)
    x[..., [3, 100]] *= 1000
    y = linear_packed(x, PackedWeight(weight), bias, epilogue)
    assert_as_accurate_as_eager(y, reference.linear, x, weight, bias, epilogue)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gives_the_same_bits_every_time_and_on_every_number_of_threads(dtype):
    x, weight, bias = inputs(200, 300, dtype, (40,))
    packed = PackedWeight(weight)
    expected = linear_packed(x, packed, bias, "gelu")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(linear_packed(x, packed, bias, "gelu"), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("epilogue", ["none", "gelu", "swiglu"])
def test_x_and_bias_have_gradients(epilogue):
    x, weight, bias = (t.requires_grad_() for t in inputs(96, 64))
    residual = torch.randn(2, 5, 48 if epilogue == "swiglu" else 96).bfloat16().requires_grad_()
    packed = PackedWeight(weight)

    def with_dense(x, bias, residual):
        return reference.linear(x, weight.detach().to(x.dtype), bias, epilogue, residual)

    def with_packed(x, bias, residual):
        return linear_packed(x, packed, bias, epilogue, residual)

    assert_gradient_as_accurate_as_eager(with_packed, with_dense, x, bias, residual)


class TwoLayers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = PackedWeight(inputs(96, 64)[1])
        self.down = PackedWeight(inputs(64, 48)[1])

    def forward(self, x):
        return linear_packed(linear_packed(x, self.up, None, "swiglu"), self.down, residual=x)


def test_compiles_without_a_graph_break_or_a_recompilation():
    model = TwoLayers()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in ((2, 5), (3, 7)):
            x = inputs(96, 64, rows=rows)[0]
            with torch._dynamo.config.patch(error_on_recompile=rows == (3, 7)):
                assert torch.equal(compiled(x), model(x))


def test_under_autocast():
    x, weight, bias = inputs(96, 64, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear_packed(x, PackedWeight(weight.bfloat16()), bias)
    assert_as_accurate_as_eager(
        y, reference.linear, x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    )


def test_says_what_it_cannot_pack():
    assert not can_pack(torch.zeros(2, 2, dtype=torch.float64))
    assert not can_pack(torch.zeros(2, 2, device="meta"))
    with pytest.raises(ValueError, match="use linear"):
        PackedWeight(torch.zeros(2, 2, dtype=torch.int8))


def test_rejects_what_does_not_fit():
    x, weight, bias = inputs(33, 64)
    packed = PackedWeight(weight)
    with pytest.raises(ValueError, match=r"x must be torch.bfloat16 of shape \(..., 64\)"):
        linear_packed(x[..., :63], packed)
    with pytest.raises(ValueError, match="got torch.float32"):
        linear_packed(x.float(), packed)
    with pytest.raises(ValueError, match=r"bias must be torch.bfloat16 of shape \(33,\)"):
        linear_packed(x, packed, bias[:32])
    with pytest.raises(ValueError, match="'swiglu' for 33 features"):
        linear_packed(x, packed, bias, "swiglu")
    with pytest.raises(ValueError, match=r"shape of the output, \(2, 5, 33\)"):
        linear_packed(x, packed, residual=x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", ["none", "gelu", "swiglu"])
def test_a_row_has_the_same_bits_in_every_batch(epilogue, dtype):
    """One caption alone and among others: the native layout sums in the same order for all rows."""
    # 3200 channels are more than a block of sums; 130 features leave part of a panel over.
    x, weight, bias = inputs(130, 3200, dtype, (300,))
    packed = PackedWeight(weight)
    if packed.data.layout != torch.strided:
        pytest.skip("oneDNN's kernels depend on the number of rows")
    whole = linear_packed(x, packed, bias, epilogue)
    for rows in (1, 2, 12, 15, 96, 257):  # decoding, tiles and parts of them, an image
        for first in (0, 300 - rows):
            some = slice(first, first + rows)
            assert torch.equal(linear_packed(x[some], packed, bias, epilogue), whole[some])


@pytest.mark.parametrize("epilogue", ["none", "gelu", "swiglu"])
def test_is_a_wellformed_operator(epilogue):
    if torch.float32 not in DTYPES:
        pytest.skip("no packed layout for float32 here")
    x, weight, bias = inputs(6, 8, torch.float32, (3,))
    residual = torch.randn(3, 3 if epilogue == "swiglu" else 6)
    packed = PackedWeight(weight).data
    leaves = [tensor.requires_grad_() for tensor in (x, bias, residual)]
    arguments = (leaves[0], packed, 6, leaves[1], epilogue, leaves[2])
    library.opcheck(torch.ops.internvl.linear_packed.default, arguments)
