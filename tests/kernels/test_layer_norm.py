import pytest
import torch
import torch.nn.functional as F

from internvl_engine import kernels, reference
from internvl_engine.kernels import layer_norm

from kernel_runs import backend_in_use, interpreted, runs, with_outliers
from numerics import assert_as_accurate_as_eager, assert_gradient_as_accurate_as_eager

EPS = 1e-6
RUNS = runs("layer_norm")
# InternViT-300M's width, pixel-shuffled tokens, rows in two dimensions, a width below one vector,
# an odd one, one element, no rows, and a width that takes several rows a program.
SHAPES = [(257, 1024), (96, 4096), (2, 65, 1024), (7, 5), (130, 41)]
SHAPES += [(1, 1), (0, 1024), (300, 64), (40,)]


def inputs(shape, dtype=torch.float32, device="cpu"):
    x = torch.randn(shape, dtype=dtype, device=device)
    return x, *(torch.randn(shape[-1], dtype=dtype, device=device) for _ in range(2))


def small(shape, backend, device):
    """What the interpreter gets: fewer rows of a wide shape."""
    rows = 64 if shape[-1] > 64 else 200
    return (min(shape[0], rows), *shape[-1:]) if interpreted(backend, device) else shape


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_is_as_accurate_as_eager(shape, device, backend, dtype):
    args = (*inputs(small(shape, backend, device), dtype, device), EPS)
    with backend_in_use("layer_norm", backend):
        y = layer_norm(*args)
    assert y.is_contiguous()
    assert_as_accurate_as_eager(y, reference.layer_norm, *args, slack=1.05)


@pytest.mark.parametrize("mean", [1e3, 1e5])
@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_rows_far_from_zero(mean, device, backend, dtype):
    """E[x**2] - E[x]**2 would have no correct digit of the variance. float16 ends at 65,504."""
    if dtype == torch.float16 and mean > 1e4:
        mean = 6e4
    x, weight, bias = inputs((260, 1024), torch.float32, device)
    x, weight, bias = ((v + s).to(dtype) for v, s in ((x, mean), (weight, 0), (bias, 0)))
    args = (x[: 40 if interpreted(backend, device) else 260], weight, bias, EPS)
    leaves = [arg.requires_grad_() for arg in args[:3]]
    with backend_in_use("layer_norm", backend):
        assert_as_accurate_as_eager(layer_norm(*args), reference.layer_norm, *args, slack=1.05)
        assert_gradient_as_accurate_as_eager(layer_norm, reference.layer_norm, *leaves, EPS)


def test_a_row_far_from_zero_loses_nothing():
    """In float32, eager PyTorch is off by 1e-4 here: it rounds the mean times rstd."""
    x, weight, bias = inputs((64, 1024))
    x += 1e3
    y, truth = (layer_norm(*args, EPS) for args in ((x, weight, bias), (x.double(), None, None)))
    truth = truth * weight + bias
    assert (y - truth).abs().max() <= 4e-6 * truth.abs().max()


@pytest.mark.parametrize("shape", [(300, 1024), (33, 4096), (130, 41), (0, 64)])
@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_gradient_is_as_accurate_as_eager(shape, device, backend, dtype):
    rows = 9 if interpreted(backend, device) and shape[1] > 64 else shape[0]
    leaves = [arg.requires_grad_() for arg in inputs((rows, shape[1]), dtype, device)]
    with backend_in_use("layer_norm", backend):
        assert_gradient_as_accurate_as_eager(layer_norm, reference.layer_norm, *leaves, EPS)


@pytest.mark.parametrize("has_weight, has_bias", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_without_weight_or_bias(has_weight, has_bias, device, backend, dtype):
    x, weight, bias = (arg.requires_grad_() for arg in inputs((200, 64), dtype, device))
    args = (x, weight if has_weight else None, bias if has_bias else None, EPS)
    with backend_in_use("layer_norm", backend):
        assert_as_accurate_as_eager(layer_norm(*args), reference.layer_norm, *args, slack=1.05)
        assert_gradient_as_accurate_as_eager(layer_norm, reference.layer_norm, *args)


@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_outlier_channels(device, backend, dtype):
    x, weight, bias = inputs((2048, 96), dtype, device)
    args = (with_outliers(x), weight, bias)
    with backend_in_use("layer_norm", backend):
        y = layer_norm(*args, EPS)
        assert_as_accurate_as_eager(y, reference.layer_norm, *args, EPS, slack=1.05)
        leaves = [args[0][:256].clone().requires_grad_(), *(v.requires_grad_() for v in args[1:])]
        # The gradient of weight is three large values, each one rounding: chance decides between 1
        # and 2 times eager's error.
        assert_gradient_as_accurate_as_eager(
            layer_norm, reference.layer_norm, *leaves, EPS, slack=2
        )


@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_extreme_values(device, backend, dtype):
    """Equal values give the bias, tiny rows are governed by eps, and NaN stays in its row."""
    x, weight, bias = inputs((5, 48), dtype, device)
    x[0], x[1], x[2, 5], x[3] = 0, 1e-7, float("nan"), 123
    with backend_in_use("layer_norm", backend):
        y = layer_norm(x, weight, bias, EPS)
    assert (y[[0, 3]] == bias).all()
    assert y[2].isnan().all() and not y[[0, 1, 3, 4]].isnan().any()
    args = (x[[1, 4]], weight, bias, EPS)
    assert_as_accurate_as_eager(y[[1, 4]], reference.layer_norm, *args, slack=2)


@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_reads_strided_input_in_place(device, backend, dtype):
    packed, weight, bias = inputs((2, 5, 3 * 128), dtype, device)
    columns = torch.randn(128, 5, dtype=dtype, device=device)
    vectors = torch.stack((weight, bias), 1)[:128]  # no unit stride either
    views = {
        "a slice of a packed qkv": packed[..., 128:256],
        "the first tokens of every sequence": packed[:, :3, :128],
        "every other row": packed[0, ::2, :128],
        "four dimensions": packed.view(2, 5, 3, 128)[:, 1:],
        "no unit stride": columns.T,
    }
    with backend_in_use("layer_norm", backend):
        for label, x in views.items():
            args = (x, *vectors.unbind(1), EPS)
            y = layer_norm(*args)
            assert y.is_contiguous(), label
            assert_as_accurate_as_eager(y, reference.layer_norm, *args, slack=1.05)


@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_twice_the_same_bits(device, backend, dtype):
    args = [arg.requires_grad_() for arg in inputs((19, 1024), dtype, device)]
    grad = torch.randn_like(args[0])
    with backend_in_use("layer_norm", backend):
        first, second = (
            (y := layer_norm(*args, EPS), *torch.autograd.grad(y, args, grad)) for _ in range(2)
        )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_float32_weight_with_16_bit_input(device, backend, dtype):
    """The result has the dtype of x, as F.layer_norm's on the CPU."""
    x, weight, bias = inputs((200, 64), dtype, device)
    args = [x.requires_grad_(), *(v.float().requires_grad_() for v in (weight, bias))]
    with backend_in_use("layer_norm", backend):
        y = layer_norm(*args, EPS)
        assert y.dtype == dtype
        assert_as_accurate_as_eager(y, reference.layer_norm, *args, EPS, slack=1.05)
        assert_gradient_as_accurate_as_eager(layer_norm, reference.layer_norm, *args, EPS)


def test_the_reference_is_pytorchs():
    x, weight, bias = inputs((3, 2, 64))
    expected = F.layer_norm(x, (64,), weight, bias, EPS)
    assert torch.equal(reference.layer_norm(x, weight, bias, EPS), expected)
    mixed = F.layer_norm(x.bfloat16(), (64,), weight, bias, EPS)
    assert torch.equal(reference.layer_norm(x.bfloat16(), weight, bias, EPS), mixed)


def test_autocast_changes_nothing(device):
    x, weight, bias = inputs((4, 64), torch.bfloat16, device)
    with torch.autocast(device, torch.bfloat16):
        y = layer_norm(x, weight, bias, EPS)
    assert torch.equal(y, layer_norm(x, weight, bias, EPS))


def test_float64_goes_through_autograd_twice():
    args = tuple(arg.double().requires_grad_() for arg in inputs((2, 6)))
    assert torch.autograd.gradcheck(layer_norm, (*args, EPS))
    assert torch.autograd.gradgradcheck(layer_norm, (*args, EPS))


def test_rejects_what_does_not_fit():
    x, weight, bias = inputs((4, 64))
    with pytest.raises(ValueError, match=r"weight must be .* of shape \(64,\)"):
        layer_norm(x, weight[:63])
    with pytest.raises(ValueError, match="got torch.float16"):
        layer_norm(x, weight.half())
    with pytest.raises(ValueError, match=r"bias must be torch.float32, .* of shape \(63,\)"):
        layer_norm(x, weight, bias[:63])
    with pytest.raises(ValueError, match="bias must be torch.bfloat16, .* got torch.float32"):
        layer_norm(x.bfloat16(), weight.bfloat16(), bias)


@pytest.mark.skipif(kernels._library.native is None, reason="built without a C++ compiler")
def test_cpu_runs_the_native_kernel():
    assert kernels.implementations()["layer_norm"]["CPU"] == "native"
