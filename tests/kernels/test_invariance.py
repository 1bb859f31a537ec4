"""A row has the same bits in a batch of any size: the switch, and what varies without it."""

from importlib import import_module

import pytest
import torch

from internvl_engine import kernels, reference

from kernel_runs import backend_in_use
from numerics import assert_as_accurate_as_eager

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs it compiled")


def cross(batch, device="cpu"):
    """Of a batch: the queries of 3 images, each its own keys."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 1, n, 16, device=device) for n in (16, 100, 100))
    return kernels.cross_attention(q[:batch], k[:batch], v[:batch])[:1]


def decode(batch, device="cpu"):
    torch.manual_seed(0)
    q = torch.randn(3, 1, 1, 16, device=device)
    k, v = (torch.randn(3, 1, 600, 16, device=device) for _ in range(2))
    return kernels.decode_attention(q[:batch], k[:batch], v[:batch])[:1]


def product(batch, device="cpu"):
    torch.manual_seed(0)
    x = torch.randn(60, 200, device=device, dtype=torch.float16)
    weight = torch.randn(40, 200, device=device, dtype=torch.float16)
    return kernels.linear(x[: 10 * batch], weight, epilogue="gelu")[:10]


OPERATORS = {"cross_attention": cross, "decode_attention": decode, "linear": product}


@interpreted
@pytest.mark.parametrize("operator", ["cross_attention", "decode_attention"])
def test_triton_splits_keys_by_the_batch_only_without_the_switch(operator):
    run = OPERATORS[operator]
    with backend_in_use(operator.removeprefix("cross_"), "triton"):
        alone, among = run(1), run(3)
        assert not torch.equal(alone, among)
        with kernels.batch_invariant():
            assert torch.equal(run(1), run(3))
        assert not torch.equal(run(1), run(3))


@interpreted
def test_triton_takes_one_configuration_for_any_number_of_rows(monkeypatch):
    """Interpreted tiles all sum alike, so what is launched is compared."""
    module = pytest.importorskip("internvl_engine.kernels.triton._linear")
    launched = []
    choose = module.launch_config

    def spy(*args):
        launched.append(choose(*args))
        return launched[-1]

    monkeypatch.setattr(module, "launch_config", spy)
    with backend_in_use("linear", "triton"):
        for batch in (1, 6):
            product(batch)
        assert launched[0] != launched[1]
        with kernels.batch_invariant():
            for batch in (1, 6):
                product(batch)
    assert launched[2] == launched[3]


def test_blas_leaves_its_place_while_the_switch_is_on():
    from internvl_engine.kernels.linear import linear_blas

    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    with kernels.batch_invariant():
        assert linear_blas(x, weight) is NotImplemented
    assert linear_blas(x, weight).shape == (2, 4)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The widths of a layer of the nano model; an odd number of channels, and of columns to be halved.
SHAPES = [(48, 96), (31, 66)]


@pytest.mark.parametrize("has_native", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", ["none", "gelu", "gelu_tanh", "gelu_quick", "swiglu"])
@pytest.mark.parametrize("channels, features", SHAPES)
def test_no_bit_of_a_dense_product_depends_on_the_batch(
    channels, features, epilogue, dtype, has_native, monkeypatch
):
    if not has_native:
        module = import_module("internvl_engine.kernels.linear")
        monkeypatch.setattr(module, "panel_of", lambda dtype: None)
    x, weight = torch.randn(70, channels).to(dtype), torch.randn(features, channels).to(dtype)
    bias, width = torch.randn(features).to(dtype), features // (1 + (epilogue == "swiglu"))
    residual = torch.randn(70, width).to(dtype)
    with kernels.batch_invariant():
        whole = kernels.linear(x, weight, bias, epilogue, residual)
        for rows in (slice(0, 1), slice(3, 4), slice(69, 70), slice(5, 40)):
            some = kernels.linear(x[rows], weight, bias, epilogue, residual[rows])
            assert torch.equal(some, whole[rows])
        assert kernels.linear(x[:0], weight, bias, epilogue).shape == (0, width)
    arguments = (x, weight, bias, epilogue, residual)
    assert_as_accurate_as_eager(whole, reference.linear, *arguments)


def test_no_bit_of_a_packed_product_depends_on_the_batch():
    """Panels are so always, which their own test shows; what oneDNN packed is unpacked for it."""
    x, weight = torch.randn(70, 48).bfloat16(), torch.randn(96, 48).bfloat16()
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN does not pack bfloat16 here")
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    with kernels.batch_invariant():
        whole = kernels.linear_packed(x, packed, 96, None, "gelu")
        for row in range(70):
            alone = kernels.linear_packed(x[row : row + 1], packed, 96, None, "gelu")
            assert torch.equal(alone[0], whole[row])


@pytest.mark.gpu
@pytest.mark.parametrize("operator", OPERATORS)
def test_on_a_gpu_no_bit_depends_on_the_batch(operator):
    with kernels.batch_invariant():
        alone, among = (OPERATORS[operator](batch, "cuda") for batch in (1, 6))
    assert torch.equal(alone, among)
