import pytest
import torch
from torch import library

from internvl_engine import kernels, reference
from internvl_engine.kernels import linear

from numerics import assert_as_accurate_as_eager, assert_gradient_as_accurate_as_eager

EPILOGUES = ["none", "gelu", "gelu_tanh", "gelu_quick", "swiglu"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Two tiles in each direction and a ragged third, one odd in everything, a single element, one row.
SHAPES = [(150, 130, 96), (7, 34, 41), (1, 2, 1), (1, 192, 256)]


@pytest.fixture(params=["default", "triton"])
def backend(request, device):
    """The backend in use, and Triton's: interpreted on the CPU, where bfloat16 is wrong."""
    if request.param == "default":
        yield "default"
        return
    pytest.importorskip("triton")
    with kernels.prefer("linear", "triton"):
        yield "triton"


def inputs(rows, features, channels, dtype=torch.float32, device="cpu"):
    x = torch.randn(rows, channels, device=device).to(dtype)
    weight = (torch.randn(features, channels, device=device) * channels**-0.5).to(dtype)
    return x, weight, torch.randn(features, device=device).to(dtype)


def residual_for(x, features, epilogue):
    width = features // 2 if epilogue == "swiglu" else features
    return torch.randn(*x.shape[:-1], width, device=x.device).to(x.dtype)


def skip_where_the_interpreter_is_wrong(backend, device, dtype):
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes on bfloat16's bit patterns (triton issue 11584)")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, epilogue, dtype, device, backend):
    skip_where_the_interpreter_is_wrong(backend, device, dtype)
    x, weight, bias = inputs(*shape, dtype, device)
    y = linear(x, weight, bias, epilogue)
    assert_as_accurate_as_eager(y, reference.linear, x, weight, bias, epilogue)


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_adds_the_residual_and_needs_no_bias(epilogue, device, backend):
    x, weight, _ = inputs(37, 70, 96, torch.float16, device)
    residual = residual_for(x, 70, epilogue)
    y = linear(x, weight, None, epilogue, residual)
    assert_as_accurate_as_eager(y, reference.linear, x, weight, None, epilogue, residual)
    y = linear(x, weight, None, epilogue, residual.float())
    assert y.dtype == torch.float32
    assert_as_accurate_as_eager(y, reference.linear, x, weight, None, epilogue, residual.float())


def test_reads_strided_inputs(device, backend):
    x, weight, bias = inputs(6 * 9 * 3, 70, 96, torch.float16, device)
    packed = x.view(6, 9, 3, 96)
    for view in (
        packed[:, :, 1],
        packed[1:4, ::2, 2],
        packed.transpose(0, 1),
        packed[0].mT[:, :96],
    ):
        if view.shape[-1] != 96:
            view = view.new_zeros(96, view.shape[0]).t()  # no unit stride: a copy is due
        residual = torch.randn(*view.shape[:-1], 140, device=device).half()[..., 70:]
        y = linear(view, weight, bias, "gelu", residual)
        assert y.is_contiguous()
        assert_as_accurate_as_eager(y, reference.linear, view, weight, bias, "gelu", residual)
    merged = torch.randn(3 * 70, 96, device=device).half()
    y = linear(x, merged[70:140], bias)
    assert_as_accurate_as_eager(y, reference.linear, x, merged[70:140], bias)


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_outlier_channels(epilogue, device, backend):
    x, weight, bias = inputs(20, 64, 512, torch.float16, device)
    x[:, [3, 100]] *= 1000
    weight[:, [3, 100]] *= 0.05  # the products still fit float16
    y = linear(x, weight, bias, epilogue)
    assert_as_accurate_as_eager(y, reference.linear, x, weight, bias, epilogue)


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_no_rows(epilogue, device, backend):
    x, weight, bias = inputs(0, 64, 96, device=device)
    y = linear(x.view(0, 5, 96), weight, bias, epilogue)
    assert y.shape == (0, 5, 32 if epilogue == "swiglu" else 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_gradient(epilogue, dtype, device):
    x, weight, bias = (t.requires_grad_() for t in inputs(37, 70, 96, dtype, device))
    residual = residual_for(x, 70, epilogue).requires_grad_()
    assert_gradient_as_accurate_as_eager(
        linear, reference.linear, x, weight, bias, epilogue, residual
    )


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_gradient_of_the_operator_itself(epilogue, device):
    """torch.compile and direct callers differentiate the fused operator, which recomputes."""
    x, weight, bias = (t.requires_grad_() for t in inputs(37, 70, 96, device=device))
    residual = residual_for(x, 70, epilogue).requires_grad_()
    assert_gradient_as_accurate_as_eager(
        torch.ops.internvl.linear.default, reference.linear, x, weight, bias, epilogue, residual
    )


def test_a_frozen_weight_gets_no_gradient(device):
    x, weight, bias = inputs(5, 8, 16, device=device)
    x.requires_grad_()
    linear(x, weight, bias, "gelu").sum().backward()
    assert x.grad.abs().sum() > 0 and weight.grad is None and bias.grad is None


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_is_a_wellformed_operator(epilogue, device):
    x, weight, bias = (t.requires_grad_() for t in inputs(5, 8, 16, device=device))
    residual = residual_for(x, 8, epilogue).requires_grad_()
    for arguments in ((x, weight), (x, weight, bias, epilogue, residual)):
        library.opcheck(torch.ops.internvl.linear.default, arguments)


def test_compiles_without_a_graph_break(device):
    x, weight, bias = inputs(5, 8, 16, device=device)
    compiled = torch.compile(linear, fullgraph=True)
    torch.testing.assert_close(
        compiled(x, weight, bias, "swiglu"), linear(x, weight, bias, "swiglu")
    )


def test_gives_the_same_bits_every_time(device, backend):
    x, weight, bias = inputs(150, 130, 96, torch.float16, device)
    first = linear(x, weight, bias, "gelu")
    assert torch.equal(first, linear(x, weight, bias, "gelu"))


def test_under_autocast(device, backend):
    if backend == "triton" and device == "cpu":
        pytest.skip("autocast on the CPU is bfloat16, which the interpreter gets wrong")
    x, weight, bias = inputs(5, 8, 16, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = linear(x, weight, bias, "gelu")
        expected = reference.linear(x, weight, bias, "gelu")
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)


def test_rejects_what_does_not_fit():
    x, weight, bias = inputs(5, 33, 16)
    with pytest.raises(ValueError, match=r"x must be torch.float32 of shape \(..., 16\)"):
        linear(x[:, :15], weight)
    with pytest.raises(ValueError, match="got torch.bfloat16"):
        linear(x.bfloat16(), weight)
    with pytest.raises(ValueError, match=r"bias must be torch.float32 of shape \(33,\)"):
        linear(x, weight, bias[:32])
    with pytest.raises(ValueError, match="'tanh' for 33 features"):
        linear(x, weight, bias, "tanh")
    with pytest.raises(ValueError, match=r"shape of the output, \(5, 33\)"):
        linear(x, weight, residual=x)
