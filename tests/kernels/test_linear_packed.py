import pytest
import torch
from torch import Tensor, library, nn

from internvl_engine import reference
from internvl_engine.kernels import (
    batch_invariant,
    layout_of,
    linear,
    linear_packed,
    pack,
    packed_nbytes,
    panel_rows,
    unpack,
)

from numerics import assert_as_accurate_as_eager, assert_gradient_as_accurate_as_eager

# Whole panels of the widest layout, part of one, the fewest channels, one row, several panels.
SHAPES = [(96, 64), (33, 42), (1, 2), (1, 3200), (200, 18)]
EPILOGUES = ["none", "gelu", "gelu_tanh", "gelu_quick", "swiglu"]
DTYPES = [
    dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if layout_of(torch.zeros(2, 2, dtype=dtype))
]
PANEL_DTYPES = [dtype for dtype in DTYPES if panel_rows(dtype)]
# For tests that need one dtype: none on a machine without any packed layout skips them.
one_dtype = pytest.mark.parametrize("dtype", DTYPES[-1:])


def inputs(features, channels, dtype=torch.bfloat16, rows=(2, 5)):
    x = torch.randn(*rows, channels).to(dtype)
    weight = (torch.randn(features, channels) * channels**-0.5).to(dtype)
    return x, weight, torch.randn(features).to(dtype)


def packed_product(x, weight, *arguments):
    return linear_packed(x, pack(weight), weight.shape[0], *arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gives_the_dense_weight_back(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    weight.view(-1)[0] = float("nan")
    weight.view(-1)[-1] = -0.0
    bits = {2: torch.int16, 4: torch.int32}[weight.element_size()]
    packed = pack(weight)
    dense = unpack(packed, *shape)
    assert (dense.shape, dense.dtype) == (weight.shape, dtype)
    assert torch.equal(dense.view(bits), weight.view(bits))
    dense.zero_()
    assert torch.equal(unpack(packed, *shape).view(bits), weight.view(bits))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dense_weight_is_not_kept(dtype):
    weight = torch.randn(96, 64).to(dtype)
    expected = weight.clone()
    packed = pack(weight)
    weight.zero_()
    assert torch.equal(unpack(packed, 96, 64), expected)


@pytest.mark.parametrize("dtype", PANEL_DTYPES)
def test_rows_of_whole_panels_are_a_range_of_the_packed_tensor(dtype):
    rows = panel_rows(dtype)
    q, k, v = (torch.randn(n * rows, 64).to(dtype) for n in (3, 1, 2))
    packed = pack(torch.cat((q, k, v)))
    assert torch.equal(packed, torch.cat([pack(part) for part in (q, k, v)]))
    x = torch.randn(5, 64).to(dtype)
    for part, panels in ((q, slice(0, 3)), (k, slice(3, 4)), (v, slice(4, 6))):
        y = linear_packed(x, packed[panels], part.shape[0])
        assert torch.equal(y, packed_product(x, part))
        assert torch.equal(unpack(packed[panels], *part.shape), part)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_a_strided_weight(dtype):
    merged = torch.randn(96, 3 * 64).to(dtype)
    for weight in (merged[:, 64:128], merged[32:64], merged.t()):
        assert torch.equal(unpack(pack(weight), *weight.shape), weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_takes_the_bytes_of_the_dense_weight(dtype):
    weight = torch.empty(960, 320, dtype=dtype)
    assert packed_nbytes(pack(weight)) == weight.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("shape", [(96, 64), (34, 42), (2, 2), (640, 3200)])
@pytest.mark.parametrize("with_bias, with_residual", [(False, False), (True, True)])
def test_matches_reference(shape, epilogue, dtype, with_bias, with_residual):
    x, weight, bias = inputs(*shape, dtype)
    width = shape[0] // 2 if epilogue == "swiglu" else shape[0]
    residual = torch.randn(2, 5, width).to(dtype) if with_residual else None
    bias = bias if with_bias else None
    y = packed_product(x, weight, bias, epilogue, residual)
    assert y.is_contiguous()
    assert_as_accurate_as_eager(y, reference.linear, x, weight, bias, epilogue, residual)


@pytest.mark.parametrize("dtype", DTYPES)
# One row, one tile, one more than a tile, a whole image; the layout is the same for all.
@pytest.mark.parametrize("rows", [(), (0,), (1,), (3, 14), (15,), (257,)])
def test_any_number_of_rows(rows, dtype):
    x, weight, bias = inputs(130, 72, dtype, rows)
    y = packed_product(x, weight, bias, "gelu")
    assert y.shape == (*rows, 130)
    if y.numel() > 0:
        assert_as_accurate_as_eager(y, reference.linear, x, weight, bias, "gelu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_strided_x(dtype):
    x, weight, bias = inputs(96, 64, dtype, (6, 9, 3))
    for view in (x[:, :, 1], x[1:4, ::2, 2], x.transpose(0, 1)[..., 0, :], x.transpose(0, 1)):
        y = packed_product(view, weight, bias)
        assert_as_accurate_as_eager(y, reference.linear, view, weight, bias)
    columns = torch.randn(64, 10).to(dtype).t()
    y = packed_product(columns, weight)
    assert_as_accurate_as_eager(y, reference.linear, columns, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_outlier_channels(epilogue, dtype):
    x, weight, bias = inputs(96, 512, dtype)
    x[..., [3, 100]] *= 1000
    y = packed_product(x, weight, bias, epilogue)
    assert_as_accurate_as_eager(y, reference.linear, x, weight, bias, epilogue)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gives_the_same_bits_every_time_and_on_every_number_of_threads(dtype):
    x, weight, bias = inputs(200, 300, dtype, (40,))
    packed = pack(weight)
    expected = linear_packed(x, packed, 200, bias, "gelu")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(linear_packed(x, packed, 200, bias, "gelu"), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", PANEL_DTYPES)
@pytest.mark.parametrize("epilogue", ["gelu_tanh", "gelu_quick"])
def test_activations_are_exact_in_the_tails_too(epilogue, dtype):
    """Where the result is small and negative, 1 + tanh(u) would cancel."""
    x = torch.linspace(-12, 12, 64 * 512).view(512, 64).to(dtype)
    y = packed_product(x, torch.eye(64, dtype=dtype), None, epilogue).double()
    factor = x.double()
    if epilogue == "gelu_tanh":
        u = (2 / torch.pi) ** 0.5 * (factor + 0.044715 * factor**3)
    else:
        u = 1.702 * factor / 2
    truth = factor * torch.sigmoid(2 * u)
    # The exponential's argument, 2 u, is rounded four times, and so are exp, the sum, the quotient
    # and the result: half a unit each.
    unit = torch.finfo(torch.float32).eps / 2
    allowed = torch.finfo(dtype).eps + unit * (4 + 4 * (2 * u).abs())
    kept = 2 * u > -80  # beyond, float32 is out of range
    assert ((y - truth).abs() <= allowed * truth.abs())[kept].all()


@one_dtype
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_x_and_bias_have_gradients(epilogue, dtype):
    x, weight, bias = (t.requires_grad_() for t in inputs(96, 64, dtype))
    residual = torch.randn(2, 5, 48 if epilogue == "swiglu" else 96).to(dtype).requires_grad_()
    packed = pack(weight)

    def with_dense(x, bias, residual):
        return reference.linear(x, weight.detach().to(x.dtype), bias, epilogue, residual)

    def with_packed(x, bias, residual):
        return linear_packed(x, packed, 96, bias, epilogue, residual)

    assert_gradient_as_accurate_as_eager(with_packed, with_dense, x, bias, residual)


class TwoLayers(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.up = nn.Buffer(pack(inputs(96, 64, dtype)[1]))
        self.down = nn.Buffer(pack(inputs(64, 48, dtype)[1]))

    def forward(self, x):
        y = linear_packed(x, self.up, 96, None, "swiglu")
        return linear_packed(y, self.down, 64, residual=x)


@one_dtype
def test_compiles_without_a_graph_break_or_a_recompilation(dtype):
    model = TwoLayers(dtype)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in ((2, 5), (3, 7)):
            x = inputs(96, 64, dtype, rows)[0]
            with torch._dynamo.config.patch(error_on_recompile=rows == (3, 7)):
                assert torch.equal(compiled(x), model(x))


@pytest.mark.skipif(torch.bfloat16 not in DTYPES, reason="no packed layout for bfloat16 here")
def test_under_autocast():
    x, weight, bias = inputs(96, 64, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = packed_product(x, weight.bfloat16(), bias)
    assert_as_accurate_as_eager(
        y, reference.linear, x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    )


class Elsewhere(Tensor):
    """A subclass whose own storage is not where its values are, as quantized weights are."""

    @staticmethod
    def __new__(cls, shape):
        return Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return cls((2, 2)) if operator is torch.ops.aten.detach.default else NotImplemented


def test_says_what_it_cannot_pack():
    without = [
        torch.zeros(2, 2, dtype=torch.float64),
        torch.zeros(2, 2, device="meta"),
        torch.zeros(2, 2, 2),
        torch.zeros(8, 0),
        torch.zeros(2, 2).to_sparse(),
        Elsewhere((2, 2)),
        nn.Parameter(Elsewhere((2, 2))),
    ]
    assert [layout_of(weight) for weight in without] == [None] * len(without)
    with pytest.raises(ValueError, match="Elsewhere of shape .* use linear"):
        pack(Elsewhere((2, 2)))


@one_dtype
def test_rejects_what_does_not_fit(dtype):
    x, weight, bias = inputs(33, 64, dtype)
    packed = pack(weight)
    with pytest.raises(ValueError, match=rf"x must be {dtype} of shape \(..., 64\)"):
        linear_packed(x[..., :63], packed, 33)
    with pytest.raises(ValueError, match="got torch.float64"):
        linear_packed(x.double(), packed, 33)
    with pytest.raises(ValueError, match=rf"bias must be {dtype} of shape \(33,\)"):
        linear_packed(x, packed, 33, bias[:32])
    with pytest.raises(ValueError, match="'swiglu' for 33 features"):
        linear_packed(x, packed, 33, bias, "swiglu")
    with pytest.raises(ValueError, match=r"shape of the output, \(2, 5, 33\)"):
        linear_packed(x, packed, 33, residual=x)


@pytest.mark.parametrize("dtype", PANEL_DTYPES)
def test_rejects_a_number_of_features_that_the_panels_do_not_have(dtype):
    rows = panel_rows(dtype)
    x, weight, _ = inputs(2 * rows, 64, dtype)
    for features in (rows, 2 * rows + 1):
        with pytest.raises(ValueError, match=f"{features} features take"):
            linear_packed(x, pack(weight), features)


@pytest.mark.parametrize("dtype", PANEL_DTYPES)
def test_refuses_the_panels_of_another_instruction_set(dtype):
    """An exported program holds packed weights, and may be loaded on another machine."""
    x, weight, _ = inputs(96, 64, dtype)
    packed = pack(weight)
    panels, steps, rows, depth = packed.shape
    others = (
        packed.view(2 * panels, steps, rows // 2, depth),
        packed.view(panels, steps // 2, rows, 2 * depth),
    )
    for other in others:
        with pytest.raises(ValueError, match="pack, or export, on the machine"):
            torch.ops.internvl.linear_packed(x, other, 96)


@pytest.fixture(params=["float64", "bfloat16", "meta"])
def default(request):
    """Another default dtype, or device, while the test calls."""
    if request.param == "meta":
        with torch.device("meta"):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, request.param))
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def operands(request):  # made before the default changes
    return {dtype: inputs(40, 64, dtype) for dtype in DTYPES}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_neither_the_default_dtype_nor_the_default_device_matters(
    operands, default, epilogue, dtype
):
    x, weight, bias = operands[dtype]
    packed = pack(weight)
    assert torch.equal(unpack(packed, 40, 64), weight)
    arguments = (weight, bias, epilogue)
    y = linear_packed(x, packed, 40, bias, epilogue)
    assert_as_accurate_as_eager(y, reference.linear, x, *arguments)
    with batch_invariant():
        assert_as_accurate_as_eager(linear(x, *arguments), reference.linear, x, *arguments)


@pytest.mark.parametrize("rows, depth", [(32, 2), (32, 1), (16, 2), (8, 1)])
def test_unpacks_the_panels_of_every_machine(rows, depth):
    weight = torch.randn(40, 12).bfloat16()
    padded = torch.zeros(-(-40 // rows) * rows, 12, dtype=torch.bfloat16)
    padded[:40] = weight
    packed = padded.view(-1, rows, 12 // depth, depth).transpose(1, 2).contiguous()
    assert torch.equal(unpack(packed, 40, 12), weight)


@pytest.mark.parametrize("dtype", PANEL_DTYPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_a_row_has_the_same_bits_in_every_batch(epilogue, dtype):
    """One caption alone and among others: the native layout sums in the same order for all rows."""
    # 3200 channels are more than a block of sums; 130 features leave part of a panel over.
    x, weight, bias = inputs(130, 3200, dtype, (300,))
    packed = pack(weight)
    whole = linear_packed(x, packed, 130, bias, epilogue)
    for rows in (1, 2, 12, 15, 96, 257):  # decoding, tiles and parts of them, an image
        for first in (0, 300 - rows):
            some = slice(first, first + rows)
            alone = linear_packed(x[some], packed, 130, bias, epilogue)
            assert torch.equal(alone, whole[some])


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_is_a_wellformed_operator(epilogue):
    if torch.float32 not in DTYPES:
        pytest.skip("no packed layout for float32 here")
    x, weight, bias = inputs(6, 8, torch.float32, (3,))
    residual = torch.randn(3, 3 if epilogue == "swiglu" else 6)
    packed = pack(weight)
    leaves = [tensor.requires_grad_() for tensor in (x, bias, residual)]
    arguments = (leaves[0], packed, 6, leaves[1], epilogue, leaves[2])
    library.opcheck(torch.ops.internvl.linear_packed.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_may_lie_anywhere_in_its_storage(dtype):
    weight = torch.randn(1 + 48 * 8, dtype=dtype)[1:].view(48, 8)
    if layout_of(weight) is None:
        pytest.skip("this machine has no packed layout for it")
    assert torch.equal(unpack(pack(weight), 48, 8), weight)
