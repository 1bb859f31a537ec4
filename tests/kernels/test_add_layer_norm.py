import pytest
import torch

from internvl_engine import reference
from internvl_engine.kernels import add_layer_norm

from kernel_runs import backend_in_use, interpreted, runs, with_outliers
from numerics import assert_as_accurate_as_eager, assert_gradient_as_accurate_as_eager

EPS = 1e-6
RUNS = runs("add_layer_norm")
# InternViT-300M's width, a wide one, odd and narrow ones, one element, no rows.
SHAPES = [(2, 129, 1024), (96, 4096), (130, 41), (1, 1), (0, 1024), (300, 64)]


def inputs(shape, dtype=torch.float32, device="cpu", has_scale=True):
    x, residual = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    scale, weight, bias = (torch.randn(shape[-1], dtype=dtype, device=device) for _ in range(3))
    return x, residual, scale if has_scale else None, weight, bias


def as_leaves(tensors):
    return tuple(None if t is None else t.detach().requires_grad_() for t in tensors)


@pytest.mark.parametrize("has_scale", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_is_as_accurate_as_eager(shape, has_scale, device, backend, dtype):
    if interpreted(backend, device):
        shape = (min(shape[0], 64 if shape[-1] > 64 else 200), shape[-1])
    args = inputs(shape, dtype, device, has_scale)
    with backend_in_use("add_layer_norm", backend):
        y, residual_out = add_layer_norm(*args, EPS)
    assert y.is_contiguous() and residual_out.is_contiguous()
    expected = reference.add_layer_norm
    assert_as_accurate_as_eager((y, residual_out), expected, *args, EPS, slack=1.05)


@pytest.mark.parametrize("has_scale", [True, False])
@pytest.mark.parametrize("shape", [(300, 1024), (33, 4096), (130, 41), (0, 64)])
@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_gradient_is_as_accurate_as_eager(shape, has_scale, device, backend, dtype):
    rows = 9 if interpreted(backend, device) and shape[1] > 64 else shape[0]
    args = as_leaves(inputs((rows, shape[1]), dtype, device, has_scale))
    with backend_in_use("add_layer_norm", backend):
        assert_gradient_as_accurate_as_eager(add_layer_norm, reference.add_layer_norm, *args, EPS)


@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_without_weight_and_bias(device, backend, dtype):
    args = (*as_leaves(inputs((200, 64), dtype, device))[:3], None, None, EPS)
    with backend_in_use("add_layer_norm", backend):
        result = add_layer_norm(*args)
        assert_as_accurate_as_eager(result, reference.add_layer_norm, *args, slack=1.05)
        assert_gradient_as_accurate_as_eager(add_layer_norm, reference.add_layer_norm, *args)


@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_gradient_where_only_one_output_is_used(device, backend, dtype):
    args = as_leaves(inputs((5, 96), dtype, device))
    for used in (0, 1):
        with backend_in_use("add_layer_norm", backend):
            assert_gradient_as_accurate_as_eager(
                lambda *a, used=used: add_layer_norm(*a)[used] + 0 * (a[3] + a[4]),
                lambda *a, used=used: reference.add_layer_norm(*a)[used] + 0 * (a[3] + a[4]),
                *args, EPS,
            )  # fmt: skip


@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_outlier_channels_and_rows_far_from_zero(device, backend, dtype):
    x, residual, scale, weight, bias = inputs((2048, 96), dtype, device)
    for onto in (with_outliers(residual), (residual.float() + 1e3).to(dtype)):
        args = (x, onto, scale, weight, bias)
        with backend_in_use("add_layer_norm", backend):
            result = add_layer_norm(*args, EPS)
            assert_as_accurate_as_eager(result, reference.add_layer_norm, *args, EPS, slack=1.05)
            args = (args[0][:256], args[1][:256], *args[2:])  # fewer rows suffice
            # The gradient of weight is three large values, each one rounding: chance decides
            # between 1 and 2 times eager's error.
            assert_gradient_as_accurate_as_eager(
                add_layer_norm, reference.add_layer_norm, *as_leaves(args), EPS, slack=2
            )


@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_reads_strided_inputs_in_place(device, backend, dtype):
    packed, other, scale, weight, bias = inputs((2, 33, 3 * 128), dtype, device)
    x, residual = packed[:, :32, 128:256], other[:, 1:, :128]
    args = (x, residual, scale[::3], weight[::3], bias[::3])
    with backend_in_use("add_layer_norm", backend):
        result = add_layer_norm(*args, EPS)
        assert_as_accurate_as_eager(result, reference.add_layer_norm, *args, EPS, slack=1.05)


@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_does_not_touch_its_inputs_and_gives_the_same_bits_twice(device, backend, dtype):
    args = as_leaves(inputs((19, 1024), dtype, device))
    before = [arg.detach().clone() for arg in args]
    grads = [torch.randn_like(args[0]) for _ in range(2)]
    with backend_in_use("add_layer_norm", backend):
        first, second = (
            (*(out := add_layer_norm(*args, EPS)), *torch.autograd.grad(out, args, grads))
            for _ in range(2)
        )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(torch.equal(arg, was) for arg, was in zip(args, before, strict=True))


@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_float32_norm_weight_with_16_bit_input(device, backend, dtype):
    x, residual, scale, weight, bias = inputs((200, 64), dtype, device)
    args = as_leaves((x, residual, scale, weight.float(), bias.float()))
    with backend_in_use("add_layer_norm", backend):
        result = add_layer_norm(*args, EPS)
        assert result[0].dtype == result[1].dtype == dtype
        assert_as_accurate_as_eager(result, reference.add_layer_norm, *args, EPS, slack=1.05)
        assert_gradient_as_accurate_as_eager(add_layer_norm, reference.add_layer_norm, *args, EPS)


def test_float64_goes_through_autograd_twice():
    args = tuple(arg.double().requires_grad_() for arg in inputs((2, 6)))
    assert torch.autograd.gradcheck(add_layer_norm, (*args, EPS))
    assert torch.autograd.gradgradcheck(add_layer_norm, (*args, EPS))


def test_rejects_what_does_not_fit():
    x, residual, scale, weight, bias = inputs((4, 64))
    with pytest.raises(ValueError, match="one shape and dtype"):
        add_layer_norm(x, residual[:3], scale, weight, bias)
    with pytest.raises(ValueError, match="one shape and dtype"):
        add_layer_norm(x, residual.bfloat16(), scale, weight, bias)
    with pytest.raises(ValueError, match="scale must be"):
        add_layer_norm(x, residual, scale.half(), weight, bias)
    with pytest.raises(ValueError, match=r"bias must .* got torch.float32 of shape \(63,\)"):
        add_layer_norm(x, residual, scale, weight, bias[:63])
