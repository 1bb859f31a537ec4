import pytest
import torch
from torch import library

from internvl_engine import kernels, reference
from internvl_engine.kernels import cross_attention

from kernel_runs import backend_in_use
from numerics import (
    assert_as_accurate_as_eager,
    assert_gradient_as_accurate_as_eager,
    assert_written,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs it compiled")


def inputs(images, repeat, heads, queries, keys, dim, dtype=torch.float32, device="cpu"):
    q = torch.randn(images * repeat, queries, heads, dim, device=device)
    k, v = (torch.randn(images, keys, heads, dim, device=device) for _ in range(2))
    return [x.to(dtype).transpose(1, 2).requires_grad_() for x in (q, k, v)]


@pytest.fixture
def triton_small_tiles(monkeypatch):
    """Triton on CPU tensors, in tiles so small that few rows are several tiles and blocks."""
    shared = pytest.importorskip("internvl_engine.kernels.triton.attention")
    module = pytest.importorskip("internvl_engine.kernels.triton.cross_attention")
    config = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    small = dict.fromkeys(("wide", "narrow", "fp32"), {"sm90": config})
    monkeypatch.setattr(module, "FORWARD", small)
    monkeypatch.setattr(shared, "QUERIES", small)
    monkeypatch.setattr(shared, "KEYS", small)
    with backend_in_use("cross_attention", "triton"):
        yield module


def check(*args) -> None:
    out = cross_attention(*args)
    assert_written(out)
    assert_as_accurate_as_eager(out, reference.cross_attention, *args)
    assert_gradient_as_accurate_as_eager(cross_attention, reference.cross_attention, *args)


# The model's 96 queries and 257 tokens; more images; queries that a beam search repeats.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2, 96, 257, 64), (2, 3, 2, 20, 70, 40)])
@pytest.mark.parametrize("interleave", [False, True])
def test_matches_reference(shape, dtype, interleave, device):
    args = (*inputs(*shape, dtype, device), interleave)
    check(*args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_that_are_not_contiguous(dtype, device):
    q, k, v = (torch.randn(n, 3, 16, 9, device=device).to(dtype).mT for n in (4, 2, 2))
    check(*(x.requires_grad_() for x in (q, k, v)))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 1, 20, 45, 24), (1, 1, 1, 33, 64, 128)])
def test_triton_interpreted(shape, dtype, interleave, triton_small_tiles):
    check(*inputs(*shape, dtype), interleave)


@interpreted
def test_small_grids_split_the_keys(triton_small_tiles, monkeypatch):
    """One program would do the work of one head; the keys are split and combined."""
    splits = []
    split_keys = triton_small_tiles.split_keys

    def spy(*args):
        splits.append(split_keys(*args))
        return splits[-1]

    monkeypatch.setattr(triton_small_tiles, "split_keys", spy)
    check(*inputs(1, 1, 1, 24, 77, 32, torch.float16))
    check(*inputs(2, 2, 4, 24, 40, 16, torch.float16), True)
    assert splits[0] == (5, 16)
    assert splits[-1] == (1, 48)


@interpreted
def test_triton_default_tiles():
    with backend_in_use("cross_attention", "triton"):
        check(*inputs(1, 1, 1, 96, 257, 16, torch.float16))


def test_repeated_rows_are_not_copied_keys(device):
    """Row i reads image i % B, or i // r where interleaved."""
    q, k, v = (x.detach() for x in inputs(2, 3, 1, 4, 9, 16, device=device))
    tiled, interleaved = cross_attention(q, k, v), cross_attention(q, k, v, interleave=True)
    for row in range(6):
        for out, image in ((tiled, row % 2), (interleaved, row // 3)):
            single = cross_attention(q[row : row + 1], k[image : image + 1], v[image : image + 1])
            torch.testing.assert_close(out[row : row + 1], single)


@interpreted
def test_triton_twice_the_same_bits(triton_small_tiles):
    args = inputs(1, 2, 1, 20, 45, 16, torch.float16)
    runs = [cross_attention(*args) for _ in range(2)]
    grads = [torch.autograd.grad(out.sum(), args) for out in runs]
    assert torch.equal(*runs)
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


@pytest.mark.parametrize("shape", [(0, 1, 2, 5, 7), (2, 1, 2, 0, 7), (2, 1, 2, 5, 0)])
@pytest.mark.parametrize("backend", ["native", "sdpa", "triton"])
def test_empty(shape, backend):
    if backend not in kernels.backends("cross_attention")["CPU"]:
        pytest.skip("triton is not interpreted here")
    with kernels.prefer("cross_attention", backend):
        args = inputs(*shape, 16)
        out = cross_attention(*args)
        assert out.shape == args[0].shape
        assert not out.any()
        grads = torch.autograd.grad(out.sum(), args)
        assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, args, strict=True))


def test_is_a_wellformed_operator(device):
    args = inputs(2, 2, 2, 5, 9, 16, device=device)
    operator = torch.ops.internvl.cross_attention.default
    library.opcheck(operator, (*args, True, 0.25, True))
    # The gradient of 16-bit inputs: opcheck cannot see through torch.func, which float32 needs.
    args = [x.detach().bfloat16() for x in args]
    out = operator(*args, False, 0.25, True)
    gradient = torch.ops.internvl.cross_attention_backward.default
    saved = (torch.randn_like(out[0]), *args, *out, False, 0.25)
    library.opcheck(gradient, saved, test_utils=("test_schema", "test_faketensor"))


def test_compiles_without_graph_breaks(device):
    args = inputs(2, 2, 2, 5, 9, 16, device=device)
    compiled = torch.compile(cross_attention, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*args), cross_attention(*args)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(x.square().sum(), args) for x in (out, expected)]
    torch.testing.assert_close(*grads)


def test_rejects_what_does_not_fit():
    q, k, v = inputs(2, 2, 2, 5, 9, 16)
    with pytest.raises(ValueError, match=r"q must be \(r \* B, H, S, D\)"):
        cross_attention(q[:3], k, v)
    with pytest.raises(ValueError, match="k and v"):
        cross_attention(q, k, v[..., :8])
    with pytest.raises(ValueError, match="one dtype"):
        cross_attention(q.half(), k, v)
