"""Keys and values shared by several rows of the batch (repeats, beams) and by several heads."""

import pytest
import torch

from internvl_engine import kernels, reference
from internvl_engine.kernels import attention, cross_attention, decode_attention

from kernel_runs import backend_in_use
from numerics import (
    assert_as_accurate_as_eager,
    assert_gradient_as_accurate_as_eager,
    assert_written,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs it compiled")


def inputs(images, repeat, key_heads, group, queries, keys, dim, dtype=torch.float32, device="cpu"):
    q = torch.randn(images * repeat, queries, key_heads * group, dim, device=device)
    k, v = (torch.randn(images, keys, key_heads, dim, device=device) for _ in range(2))
    return [x.to(dtype).transpose(1, 2).requires_grad_() for x in (q, k, v)]


def padding(images, keys, device="cpu"):
    """Left padding of the last row, which in a causal mask leaves rows that see nothing."""
    real = torch.rand(images, keys, device=device) > 0.2
    real[-1, : keys // 2] = False
    real[:, -1] = True
    return real


@pytest.fixture
def triton_small_tiles(monkeypatch):
    """Triton on CPU tensors, in tiles so small that few rows are several tiles and blocks."""
    module = pytest.importorskip("internvl_engine.kernels.triton.attention")
    config = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    for table in ("FORWARD", "QUERIES", "KEYS"):
        small = dict.fromkeys(("wide", "narrow", "fp32"), {"sm90": config})
        monkeypatch.setattr(module, table, small)
    with backend_in_use("attention", "triton"):
        yield module


def check(*args) -> None:
    """The gradient of a shared key is one sum over r * G times the rows of each of eager's sums,
    which it adds afterwards: rounding errors of float32 grow with the square root of the length,
    so up to sqrt(r * G) times eager's; about half of that is allowed.
    """
    out = attention(*args)
    assert_written(out)
    assert_as_accurate_as_eager(out, reference.attention, *args)
    shared = args[0].shape[0] * args[0].shape[1] / (args[1].shape[0] * args[1].shape[1])
    assert_gradient_as_accurate_as_eager(
        attention, reference.attention, *args, slack=max(1.25, shared**0.5 / 2 + 0.5)
    )


# The model's 96 queries and 257 tokens; queries that a beam search repeats; heads that share keys.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape, interleave",
    [((1, 1, 2, 1, 96, 257, 64), False), ((2, 3, 2, 1, 20, 70, 40), True),
     ((2, 2, 1, 3, 20, 70, 40), False)],
)  # fmt: skip
def test_cross_attention_matches_reference(shape, interleave, dtype, device):
    args = (*inputs(*shape, dtype, device), interleave)
    out = cross_attention(*args)
    assert out.transpose(1, 2).is_contiguous()
    assert_as_accurate_as_eager(out, reference.cross_attention, *args)
    assert_gradient_as_accurate_as_eager(cross_attention, reference.cross_attention, *args)


@pytest.mark.parametrize("backend", ["native", "sdpa"])
@pytest.mark.parametrize("mask", reference.MASKS)
def test_every_mask(backend, mask):
    if backend not in kernels.backends("attention")["CPU"]:
        pytest.skip("no native kernels here")
    with backend_in_use("attention", backend):
        check(*inputs(2, 2, 2, 3, 13, 21, 16), mask, 15, None, None, True)
        check(*inputs(2, 2, 2, 3, 13, 21, 16), mask, 15, padding(2, 21))


@interpreted
@pytest.mark.parametrize("mask", reference.MASKS)
@pytest.mark.parametrize("padded", [False, True])
def test_triton_interpreted(mask, padded, triton_small_tiles):
    """Tiles that hold the end of one row's positions and the start of another's."""
    args = inputs(2, 2, 1, 2, 13, 37, 16, torch.float16)
    check(*args, mask, 28, padding(2, 37) if padded else None, None, mask == "causal")


@interpreted
def test_small_grids_split_the_keys(triton_small_tiles, monkeypatch):
    """One program would do the work of one head; the keys are split and combined."""
    splits = []
    split_keys = triton_small_tiles.split_keys

    def spy(*args):
        splits.append(split_keys(*args))
        return splits[-1]

    monkeypatch.setattr(triton_small_tiles, "split_keys", spy)
    check(*inputs(1, 1, 1, 1, 24, 77, 32, torch.float16))
    check(*inputs(2, 2, 4, 1, 24, 40, 16, torch.float16))
    assert splits[0] == (5, 16)
    assert splits[-1] == (1, 48)
    splits.clear()
    check(
        *inputs(1, 1, 1, 1, 24, 77, 32, torch.float16), "causal"
    )  # a part may hold no key of a row
    assert not splits


@interpreted
def test_triton_default_tiles():
    with backend_in_use("attention", "triton"):
        args = inputs(1, 1, 1, 1, 96, 257, 16, torch.float16)
        assert_as_accurate_as_eager(attention(*args), reference.attention, *args)


def test_each_query_reads_the_keys_of_its_row_and_head(device):
    """Row i reads image i % B, or i // r where interleaved; head h key head h // group."""
    q, k, v = (x.detach() for x in inputs(2, 3, 2, 2, 4, 9, 16, device=device))
    tiled, interleaved = attention(q, k, v), attention(q, k, v, interleave=True)
    for row in range(6):
        for out, image in ((tiled, row % 2), (interleaved, row // 3)):
            for head in range(4):
                one = slice(head // 2, head // 2 + 1)
                keys, values = (x[image : image + 1, one] for x in (k, v))
                single = attention(q[row : row + 1, head : head + 1], keys, values)
                torch.testing.assert_close(out[row, head], single[0, 0])


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding(backend, dtype):
    if backend not in kernels.backends("decode_attention")["CPU"]:
        pytest.skip(f"no backend {backend} here")
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter is wrong for bfloat16")
    q = torch.randn(2, 6, 1, 40).to(dtype)
    k, v = torch.randn(2, 2, 2, 67, 40).to(dtype)
    args = (q, k, v, torch.tensor([67, 40]), padding(2, 67).fill_(True))
    args[-1][:, 3:9] = False
    with backend_in_use("decode_attention", backend):
        out = decode_attention(*args)
    assert_as_accurate_as_eager(out, reference.decode_attention, *args)
    for head in range(6):
        one = slice(head // 3, head // 3 + 1)
        single = decode_attention(q[:, head : head + 1], k[:, one], v[:, one], *args[3:])
        assert (single - out[:, head : head + 1]).abs().max() <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", [(0, 1, 2, 1, 5, 7), (2, 3, 2, 2, 0, 7), (2, 3, 2, 2, 5, 0)])
@pytest.mark.parametrize("backend", ["native", "sdpa", "triton"])
def test_empty(shape, backend):
    if backend not in kernels.backends("attention")["CPU"]:
        pytest.skip(f"no backend {backend} here")
    with kernels.prefer("attention", backend):
        args = inputs(*shape, 16)
        out = cross_attention(*args)
        assert out.shape == args[0].shape
        assert not out.any()
        grads = torch.autograd.grad(out.sum(), args)
        assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, args, strict=True))


def test_rejects_what_does_not_fit():
    q, k, v = inputs(2, 2, 2, 2, 5, 9, 16)
    with pytest.raises(ValueError, match=r"q must be \(r \* B, H, S, D\)"):
        cross_attention(q[:3], k, v)
    with pytest.raises(ValueError, match="Hk a divisor of H"):
        attention(q[:, :3], k, v)
    with pytest.raises(ValueError, match="Hk a divisor of H"):
        decode_attention(q[:2, :3, :1], k, v)
    with pytest.raises(ValueError, match="k and v"):
        cross_attention(q, k, v[..., :8])
    with pytest.raises(ValueError, match="one dtype"):
        cross_attention(q.half(), k, v)
