import pytest
import torch

from internvl_engine import reference
from internvl_engine.kernels import add_rms_norm

from kernel_runs import backend_in_use, interpreted, runs, with_outliers
from numerics import assert_as_accurate_as_eager, assert_gradient_as_accurate_as_eager

EPS = 1e-6
RUNS = runs("add_rms_norm")
# The vision tower's width and QLLaMA's, odd and narrow widths, one element, no rows.
SHAPES = [(2, 257, 3200), (96, 4096), (130, 41), (1, 1), (0, 3200), (300, 64)]


def inputs(shape, dtype=torch.float32, device="cpu", has_scale=True):
    x, residual = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    scale, weight = (torch.randn(shape[-1], dtype=dtype, device=device) for _ in range(2))
    return x, residual, scale if has_scale else None, weight


def as_leaves(tensors):
    return tuple(None if t is None else t.detach().requires_grad_() for t in tensors)


@pytest.mark.parametrize("has_scale", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_is_as_accurate_as_eager(shape, has_scale, device, backend, dtype):
    if interpreted(backend, device):
        shape = (min(shape[0], 64 if shape[-1] > 64 else 200), shape[-1])
    args = inputs(shape, dtype, device, has_scale)
    with backend_in_use("add_rms_norm", backend):
        y, residual_out = add_rms_norm(*args, EPS)
    assert y.is_contiguous() and residual_out.is_contiguous()
    assert_as_accurate_as_eager((y, residual_out), reference.add_rms_norm, *args, EPS, slack=1.05)


@pytest.mark.parametrize("has_scale", [True, False])
@pytest.mark.parametrize("shape", [(300, 3200), (33, 4096), (130, 41), (0, 64)])
@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_gradient_is_as_accurate_as_eager(shape, has_scale, device, backend, dtype):
    rows = 9 if interpreted(backend, device) and shape[1] > 64 else shape[0]
    args = as_leaves(inputs((rows, shape[1]), dtype, device, has_scale))
    with backend_in_use("add_rms_norm", backend):
        assert_gradient_as_accurate_as_eager(add_rms_norm, reference.add_rms_norm, *args, EPS)


@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_gradient_where_only_one_output_is_used(device, backend, dtype):
    args = as_leaves(inputs((5, 96), dtype, device))
    for used in (0, 1):
        with backend_in_use("add_rms_norm", backend):
            assert_gradient_as_accurate_as_eager(
                lambda *a, used=used: add_rms_norm(*a)[used] + 0 * a[3],
                lambda *a, used=used: reference.add_rms_norm(*a)[used] + 0 * a[3],
                *args, EPS,
            )  # fmt: skip


@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_outlier_channels(device, backend, dtype):
    x, residual, scale, weight = inputs((2048, 96), dtype, device)
    args = (x, with_outliers(residual), scale, weight)
    with backend_in_use("add_rms_norm", backend):
        result = add_rms_norm(*args, EPS)
        assert_as_accurate_as_eager(result, reference.add_rms_norm, *args, EPS, slack=1.05)
        args = (args[0][:256], args[1][:256], *args[2:])  # fewer rows suffice
        # The gradient of weight is three large values, each one rounding: chance decides between 1
        # and 2 times eager's error.
        assert_gradient_as_accurate_as_eager(
            add_rms_norm, reference.add_rms_norm, *as_leaves(args), EPS, slack=2
        )


@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_reads_strided_inputs_in_place(device, backend, dtype):
    packed, other, scale, weight = inputs((2, 33, 3 * 128), dtype, device)
    x, residual = packed[:, :32, 128:256], other[:, 1:, :128]
    args = (x, residual, scale[:128], weight[:128])
    with backend_in_use("add_rms_norm", backend):
        result = add_rms_norm(*args, EPS)
        assert_as_accurate_as_eager(result, reference.add_rms_norm, *args, EPS, slack=1.05)


@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_does_not_touch_its_inputs_and_gives_the_same_bits_twice(device, backend, dtype):
    args = as_leaves(inputs((19, 3200), dtype, device))
    before = [arg.detach().clone() for arg in args]
    grads = [torch.randn_like(args[0]) for _ in range(2)]
    with backend_in_use("add_rms_norm", backend):
        first, second = (
            (*(out := add_rms_norm(*args, EPS)), *torch.autograd.grad(out, args, grads))
            for _ in range(2)
        )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(torch.equal(arg, was) for arg, was in zip(args, before, strict=True))


@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_float32_norm_weight_with_16_bit_input(device, backend, dtype):
    x, residual, scale, weight = inputs((200, 64), dtype, device)
    args = as_leaves((x, residual, scale, weight.float()))
    with backend_in_use("add_rms_norm", backend):
        y, residual_out = add_rms_norm(*args, EPS)
        assert y.dtype == torch.float32 and residual_out.dtype == dtype
        assert_as_accurate_as_eager(
            (y, residual_out), reference.add_rms_norm, *args, EPS, slack=1.05
        )
        assert_gradient_as_accurate_as_eager(add_rms_norm, reference.add_rms_norm, *args, EPS)


def test_autocast_changes_nothing(device):
    args = inputs((4, 64), torch.bfloat16, device)
    with torch.autocast(device, torch.bfloat16):
        results = add_rms_norm(*args, EPS)
    assert all(torch.equal(a, b) for a, b in zip(results, add_rms_norm(*args, EPS), strict=True))


def test_rejects_what_does_not_fit():
    x, residual, scale, weight = inputs((4, 64))
    with pytest.raises(ValueError, match="one shape and dtype"):
        add_rms_norm(x, residual[:3], scale, weight)
    with pytest.raises(ValueError, match="one shape and dtype"):
        add_rms_norm(x, residual.bfloat16(), scale, weight)
    with pytest.raises(ValueError, match=r"weight must .* got torch.float32 of shape \(63,\)"):
        add_rms_norm(x, residual, scale, weight[:63])
    with pytest.raises(ValueError, match="scale must be"):
        add_rms_norm(x, residual, scale.half(), weight)
