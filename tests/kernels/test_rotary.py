import sys
from types import SimpleNamespace

import pytest
import torch

from internvl_engine import kernels, reference
from internvl_engine.kernels import rotary

from kernel_runs import backend_in_use, runs
from numerics import assert_as_accurate_as_eager, assert_gradient_as_accurate_as_eager

RUNS = runs("rotary")
# (B, H, S, D): QLLaMA's heads, the nano model's, an odd half, one element pair, no tokens.
SHAPES = [(2, 32, 7, 128), (3, 4, 5, 16), (1, 3, 2, 22), (1, 1, 1, 2), (2, 4, 0, 16), (1, 9, 3, 80)]
TABLE = 300


def inputs(shape, dtype=torch.float32, device="cpu", shared=False):
    batch, heads, tokens, dim = shape
    q, k = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    cos, sin = reference.rotary_table(TABLE, dim, 10000.0, dtype, device)
    rows = 1 if shared else batch
    return q, k, cos, sin, torch.randint(0, TABLE, (rows, tokens), device=device)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_is_as_accurate_as_eager(shape, shared, device, backend, dtype):
    q, k, *rest = inputs(shape, dtype, device, shared)
    q.requires_grad_(), k.requires_grad_()
    with backend_in_use("rotary", backend):
        assert_as_accurate_as_eager(rotary(q, k, *rest), reference.rotary, q, k, *rest)
        assert_gradient_as_accurate_as_eager(rotary, reference.rotary, q, k, *rest)


@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_reads_a_packed_qkv_in_place(device, backend, dtype):
    """And leaves the result in the memory order of the slices, where attention reads it."""
    _, _, *rest = inputs((2, 4, 6, 32), dtype, device)
    qkv = torch.randn(2, 6, 3, 4, 32, dtype=dtype, device=device)
    before = qkv.clone()
    q, k, _ = (x.transpose(1, 2) for x in qkv.unbind(2))
    with backend_in_use("rotary", backend):
        q_out, k_out = rotary(q, k, *rest)
    assert q_out.transpose(1, 2).is_contiguous() and k_out.transpose(1, 2).is_contiguous()
    assert_as_accurate_as_eager((q_out, k_out), reference.rotary, q, k, *rest)
    assert torch.equal(qkv, before)


def test_the_cuda_kernel_gets_no_tables_that_do_not_start_on_16_bytes(monkeypatch):
    module = sys.modules[rotary.__module__]
    calls = []
    monkeypatch.setattr(
        module, "native_cuda", SimpleNamespace(rotary=lambda *args: calls.append(1))
    )
    monkeypatch.setattr(module._cuda, "stream", lambda: 0)
    q, k, cos, sin, positions = inputs((1, 2, 3, 16))
    module.rotary_cuda(q, k, cos, sin, positions)
    assert calls == [1]
    off_by_one = torch.empty(cos.numel() + 1)[1:].view_as(cos).copy_(cos)
    assert module.rotary_cuda(q, k, off_by_one, sin, positions) is NotImplemented
    assert calls == [1]


@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_elements_apart_from_each_other(device, backend, dtype):
    q, k, *rest = inputs((2, 4, 6, 32), dtype, device)
    q = q.transpose(1, 3).contiguous().transpose(1, 3)
    with backend_in_use("rotary", backend):
        assert_as_accurate_as_eager(rotary(q, k, *rest), reference.rotary, q, k, *rest)


@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_a_gradient_that_is_dense_but_transposed(device, backend, dtype):
    """As the product q @ k.transpose(-2, -1) sends it back for k."""
    q, k, *rest = inputs((2, 4, 6, 16), dtype, device)
    q.requires_grad_(), k.requires_grad_()
    grads = [torch.randn(2, 4, 16, 6, dtype=dtype, device=device).mT for _ in range(2)]
    with backend_in_use("rotary", backend):
        assert_gradient_as_accurate_as_eager(rotary, reference.rotary, q, k, *rest, grads=grads)


@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_fewer_key_heads_than_query_heads(device, backend, dtype):
    q, k, *rest = inputs((2, 6, 5, 16), dtype, device)
    k = k[:, :2]
    with backend_in_use("rotary", backend):
        assert_as_accurate_as_eager(rotary(q, k, *rest), reference.rotary, q, k, *rest)


@pytest.mark.parametrize("device, backend, dtype", RUNS)
def test_twice_the_same_bits_and_int32_positions(device, backend, dtype):
    q, k, cos, sin, positions = inputs((2, 4, 6, 32), dtype, device)
    with backend_in_use("rotary", backend):
        first, second = rotary(q, k, cos, sin, positions), rotary(q, k, cos, sin, positions.int())
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_promotes_as_pytorch_does(device):
    """As under autocast: q and k from a product in bfloat16, tables in float32."""
    q, k, *rest = inputs((2, 3, 4, 16), device=device)
    q, k = q.detach().bfloat16().requires_grad_(), k.detach().bfloat16().requires_grad_()
    assert_as_accurate_as_eager(rotary(q, k, *rest), reference.rotary, q, k, *rest)
    assert_gradient_as_accurate_as_eager(rotary, reference.rotary, q, k, *rest)


def test_empty_batch(device):
    q, k, cos, sin, positions = inputs((2, 3, 4, 16), device=device)
    turned = rotary(q[:0], k[:0], cos, sin, positions[:0])
    assert all(x.shape == (0, 3, 4, 16) for x in turned)


def test_rejects_what_does_not_fit():
    q, k, cos, sin, positions = inputs((2, 3, 4, 16))
    with pytest.raises(ValueError, match="differ in H only"):
        rotary(q, k[:, :, :3], cos, sin, positions)
    with pytest.raises(ValueError, match="with D = 16"):
        rotary(q, k, cos[:, :7], sin[:, :7], positions)
    with pytest.raises(ValueError, match="must be torch.float32 as q is"):
        rotary(q, k, cos, sin.half(), positions)
    with pytest.raises(ValueError, match=r"q must be \(B, H, S, D\)"):
        rotary(q[0], k, cos, sin, positions)
    with pytest.raises(ValueError, match="positions must be integers"):
        rotary(q, k, cos, sin, positions[:, :2])


@pytest.mark.parametrize("backend", kernels.backends("rotary")["CPU"])
def test_a_position_outside_the_table_is_an_error(backend):
    q, k, cos, sin, positions = inputs((2, 3, 4, 16))
    if backend == "triton":
        pytest.skip("a GPU cannot tell, and the interpreter stands for one")
    positions[1, 2] = TABLE
    with kernels.prefer("rotary", backend), pytest.raises(IndexError, match="300"):
        rotary(q, k, cos, sin, positions)
