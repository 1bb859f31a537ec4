import pytest
import torch
from gemv_cases import DTYPES, FORMS, dense, normed, weight_in
from host_gpu import host_gpu, needs_compiler

from internvl_engine import kernels, reference
from internvl_engine.kernels import _decoding, batch_invariant, norm_linear
from internvl_engine.kernels.linear import linear_cuda
from internvl_engine.kernels.linear_int4 import linear_int4_cuda
from internvl_engine.kernels.linear_int8 import linear_int8_cuda
from internvl_engine.kernels.norm_linear import norm_linear_cuda

from kernel_runs import with_outliers
from numerics import assert_as_accurate_as_eager

EPS = 1e-6
# (rows, C, F): one row of several tiles a block; columns of less than a vector a warp, and features
# that fill no tile; more columns than shared memory holds of 8 rows; one feature.
SHAPES = [(1, 1032, 200), (3, 40, 70), (8, 5000, 70), (5, 264, 1)]


def inputs(rows, columns, features, dtype=torch.bfloat16, form="wide"):
    x = with_outliers(torch.randn(rows, columns)).to(dtype)
    weight = torch.randn(features, columns) / columns**0.5
    return x, weight_in(form, weight.to(dtype)), torch.randn(columns).to(dtype)


def run_cuda(x, parts, features, bias=None, epilogue="none", norm_weight=None, squares=None):
    three = (*parts, None, None)[:3]
    return norm_linear_cuda(x, *three, features, bias, epilogue, norm_weight, squares, EPS)


def truth(form, parts, features):
    """The reference as a function of x, its bias and norm, whose weight follows their dtype."""

    def run(x, bias, epilogue, norm_weight, squares):
        weight = dense(form, parts, features, x.shape[-1], x.dtype)
        return _decoding.norm_linear(x, weight, bias, epilogue, norm_weight, squares, EPS)

    return run


@needs_compiler
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_the_cuda_kernel_is_as_accurate_as_eager(form, dtype, shape):
    rows, columns, features = shape
    x, parts, norm_weight = inputs(*shape, dtype, form)
    bias = torch.randn(features).to(dtype)
    options = (bias, "none", *normed(x, norm_weight))
    with host_gpu() as gpu:
        y = run_cuda(x, parts, features, *options)
    assert gpu.calls == 1
    assert_as_accurate_as_eager(y, truth(form, parts, features), x, *options)


@needs_compiler
@pytest.mark.parametrize("epilogue", ["swiglu", "gelu", "gelu_tanh", "gelu_quick"])
@pytest.mark.parametrize("form", FORMS[:3])
def test_epilogues(form, epilogue):
    features = 192  # three panels of gate and three of up
    x, parts, _ = inputs(2, 328, features, form=form)
    bias = torch.randn(features).bfloat16()
    for options in ((bias, epilogue, None, None), (None, epilogue, None, None)):
        with host_gpu(processors=1):
            y = run_cuda(x, parts, features, *options)
        assert_as_accurate_as_eager(y, truth(form, parts, features), x, *options)


@needs_compiler
def test_gate_and_up_that_fill_no_tile():
    x, parts, _ = inputs(2, 64, 44)
    with host_gpu():
        y = run_cuda(x, parts, 44, None, "swiglu")
    assert_as_accurate_as_eager(y, truth("wide", parts, 44), x, None, "swiglu", None, None)


@needs_compiler
@pytest.mark.parametrize("form", FORMS[:3])
def test_no_bit_depends_on_the_batch_or_the_order_of_threads(form):
    x, parts, norm_weight = inputs(8, 5000, 40, form=form)
    norm = normed(x, norm_weight)
    with host_gpu():
        whole = run_cuda(x, parts, 40, None, "none", *norm)
    with host_gpu(processors=1, backwards=True):
        assert torch.equal(run_cuda(x, parts, 40, None, "none", *norm), whole)
    with host_gpu():
        for row in (0, 5):
            squares = norm[1][row : row + 1]
            alone = run_cuda(x[row : row + 1], parts, 40, None, "none", norm_weight, squares)
            assert torch.equal(alone[0], whole[row])


@needs_compiler
def test_nothing_that_the_kernel_before_writes_is_read_too_early():
    """x arrives while the kernel runs, as under programmatic dependent launch."""
    x, parts, norm_weight = inputs(2, 1024, 40)
    norm = normed(x, norm_weight)
    with host_gpu():
        expected = run_cuda(x, parts, 40, None, "none", *norm)
    for late, arguments in (
        (x, lambda hole: (hole, parts, 40, None, "none", *norm)),
        (norm[1], lambda hole: (x, parts, 40, None, "none", norm_weight, hole)),
    ):
        hole = torch.full_like(late, float("nan"))
        with host_gpu(arrives=(hole, late)):
            assert torch.equal(run_cuda(*arguments(hole)), expected)


@needs_compiler
def test_squares_are_computed_where_nobody_has_them():
    x, parts, norm_weight = inputs(2, 256, 40)
    with host_gpu():
        y = run_cuda(x, parts, 40, None, "none", norm_weight, None)
    options = (None, "none", norm_weight, None)
    assert_as_accurate_as_eager(y, truth("wide", parts, 40), x, *options)


@needs_compiler
@pytest.mark.parametrize("form", FORMS[:3])
def test_serves_the_plain_linears_too(form):
    """`linear`, `linear_int8`, `linear_int4`: x a slice of something larger, and a residual."""
    wide, parts, _ = inputs(3, 512, 96, form=form)
    x, residual = wide[:, 128:384], torch.randn(3, 200).bfloat16()[:, 8:104]
    parts = weight_in(form, torch.randn(96, 256).bfloat16())
    launch = {"wide": linear_cuda, "int8": linear_int8_cuda, "int4": linear_int4_cuda}[form]
    options = (96,) if form == "int4" else ()
    with host_gpu() as gpu:
        y = launch(x, *parts, *options, None, "gelu", residual)
    assert gpu.calls == 1

    def expected(x, residual):
        return reference.linear(x, dense(form, parts, 96, 256, x.dtype), None, "gelu", residual)

    assert_as_accurate_as_eager(y, expected, x, residual)


@pytest.mark.parametrize(
    "change",
    ["nine rows", "no rows", "float32", "columns", "weight off 16 bytes", "swiglu", "invariant"],
)
def test_what_the_cuda_kernel_leaves_to_others(change):
    x, parts, _ = inputs(1, 64, 96, form="int8" if change == "swiglu" else "wide")
    if change == "nine rows":
        x = x.expand(9, 64)
    elif change == "no rows":
        x = x[:0]
    elif change == "float32":
        x, parts = x.float(), (parts[0].float(),)
    elif change == "columns":
        x, parts = x[:, :60], (parts[0][:, :60].contiguous(),)
    elif change == "weight off 16 bytes":
        parts = (torch.zeros(96 * 64 + 1, dtype=x.dtype)[1:].view(96, 64),)
    if change == "invariant":
        with batch_invariant():
            assert run_cuda(x, parts, 96) is NotImplemented
    else:
        epilogue = "swiglu" if change == "swiglu" else "none"
        assert run_cuda(x, parts, 96, None, epilogue) is NotImplemented


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", kernels.backends("norm_linear")["CPU"])
def test_every_backend_of_the_cpu(backend, form):
    """int4 on the CPU rounds x too: 1 % of noise."""
    x, parts, norm_weight = inputs(3, 256, 64, torch.float32, form)
    x = torch.randn_like(x)
    options = (None, "swiglu", *normed(x, norm_weight))
    with kernels.prefer("norm_linear", backend):
        y = norm_linear(x, parts, 64, *options, EPS)
    expected = truth(form, parts, 64)(x, *options)
    assert (y - expected).norm() / expected.norm() < (2e-2 if form != "wide" else 1e-5)


def test_rejects_what_does_not_fit():
    x, parts, norm_weight = inputs(3, 64, 96)
    with pytest.raises(ValueError, match=r"a weight \(95, 64\)"):
        norm_linear(x, parts, 95)
    with pytest.raises(ValueError, match=r"norm_weight must be torch.bfloat16 of shape \(64,\)"):
        norm_linear(x, parts, 96, norm_weight=norm_weight[:63])
    with pytest.raises(ValueError, match="or both None"):
        norm_linear(x, parts, 96, squares=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="epilogue must be"):
        norm_linear(x, parts, 96, epilogue="relu")
