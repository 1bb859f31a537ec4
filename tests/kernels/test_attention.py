import sys
from types import ModuleType

import pytest
import torch

from internvl_engine import kernels, reference
from internvl_engine.kernels import _attention, attention

from kernel_runs import backend_in_use
from numerics import (
    assert_as_accurate_as_eager,
    assert_gradient_as_accurate_as_eager,
    assert_written,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs it compiled")


def inputs(batch, heads, queries, keys, dim, dtype=torch.float32, device="cpu"):
    """q, k, v as projections give them: (B, S, H, D) in memory."""
    return [
        torch.randn(batch, n, heads, dim, device=device).to(dtype).transpose(1, 2).requires_grad_()
        for n in (queries, keys, keys)
    ]


def padding(batch, keys, device="cpu"):
    """Holes anywhere, and padding on the left of the second row of the batch."""
    real = torch.rand(batch, keys, device=device) > 0.2
    real[-1, : keys // 4] = False
    real[:, keys // 2] = True
    return real


@pytest.fixture
def triton_small_tiles(monkeypatch):
    """Triton on CPU tensors, in tiles so small that few positions are several tiles and blocks."""
    module = pytest.importorskip("internvl_engine.kernels.triton.attention")
    config = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    for table in ("FORWARD", "QUERIES", "KEYS"):
        small = dict.fromkeys(("wide", "narrow", "fp32"), {"sm90": config})
        monkeypatch.setattr(module, table, small)
    with backend_in_use("attention", "triton"):
        yield


def check(*args) -> None:
    out = attention(*args)
    assert_written(out)
    assert_as_accurate_as_eager(out, reference.attention, *args)
    assert_gradient_as_accurate_as_eager(attention, reference.attention, *args)


# Image features (96 queries), a caption's prefill, ordinary causal text, and queries after a cache.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "mask, prefix, queries, keys", [
        ("full", 0, 96, 96), ("prefix", 96, 120, 120), ("causal", 0, 81, 81),
        ("block", 96, 130, 130), ("causal", 0, 20, 60), ("prefix", 30, 50, 77),
    ],
)  # fmt: skip
@pytest.mark.parametrize("padded", [False, True])
def test_matches_reference(mask, prefix, queries, keys, dtype, padded, device):
    q, k, v = inputs(2, 2, queries, keys, 64, dtype, device)
    real = padding(2, keys, device) if padded else None
    args = (q, k, v, mask, prefix, real)
    out = attention(*args)
    assert out.transpose(1, 2).is_contiguous()
    assert_as_accurate_as_eager(out, reference.attention, *args)
    if dtype != torch.float16 or not padded:  # one 16-bit type suffices for the slower half
        assert_gradient_as_accurate_as_eager(attention, reference.attention, *args)


@interpreted
@pytest.mark.parametrize("mask", reference.MASKS)
@pytest.mark.parametrize("padded, dtype", [(False, torch.float16), (True, torch.float32)])
def test_triton_interpreted(mask, dtype, padded, triton_small_tiles):
    """A prefix that ends inside a block, and rows that see nothing but are not alone in a tile."""
    real = padding(2, 45) if padded else None
    if padded:
        real[-1, 19:22] = False  # text that is padded on the left: in `block` it sees nothing
    check(*inputs(2, 1, 45, 45, 24, dtype), mask, 19, real)


@interpreted
@pytest.mark.parametrize(
    "mask, prefix, queries, keys, dim",
    [
        ("full", 0, 33, 50, 128),  # more keys than queries
        ("causal", 0, 17, 49, 16),
        ("prefix", 40, 30, 60, 32),  # some queries within the prefix, some after it
        ("block", 40, 30, 60, 32),
        ("block", 99, 20, 20, 16),  # a prefix longer than the sequence
    ],
)
def test_triton_interpreted_shapes(mask, prefix, queries, keys, dim, triton_small_tiles):
    check(*inputs(1, 2, queries, keys, dim, torch.float16), mask, prefix)


@interpreted
def test_triton_default_tiles_at_qllama_lengths():
    with backend_in_use("attention", "triton"):
        check(*inputs(1, 1, 176, 176, 16, torch.float16), "prefix", 96, padding(1, 176))


@pytest.mark.parametrize("backend", ["native", "sdpa", "triton", "reference"])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_a_row_that_sees_nothing_is_the_mean_of_all_values(backend, mask):
    if backend not in kernels.backends("attention")["CPU"]:
        pytest.skip("triton is not interpreted here")
    q, k, v = inputs(2, 1, 20, 20, 16)
    real = torch.ones(2, 20, dtype=torch.bool)
    real[1, :7] = False  # left padding: in a causal mask its own rows see nothing
    if mask == "full":
        real[1] = False
    with kernels.prefer("attention", backend):
        args = (q, k, v, mask, 0, real)
        out = attention(*args)
        mean = v[1].mean(1, keepdim=True)
        torch.testing.assert_close(out[1, :, :7], mean.expand(-1, 7, -1))
        assert_gradient_as_accurate_as_eager(attention, reference.attention, *args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 24, 40, 72, 88, 112, 160])
def test_head_widths(dim, dtype, device):
    q, k, v = inputs(2, 3, 37, 45, dim, dtype, device)
    assert_as_accurate_as_eager(
        attention(q, k, v, "causal"), reference.attention, q, k, v, "causal"
    )


@pytest.mark.parametrize("backend", ["native", "sdpa", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_that_are_not_contiguous(backend, dtype):
    if backend not in kernels.backends("attention")["CPU"]:
        pytest.skip("triton is not interpreted here")
    if backend == "triton" and dtype != torch.float16:
        pytest.skip("the interpreter is slow, and wrong for bfloat16")
    q, k, v = (torch.randn(2, 3, 16, 70).to(dtype).mT.requires_grad_() for _ in range(3))
    with kernels.prefer("attention", backend):
        check(q, k, v, "causal")


def test_queries_are_shared_among_any_number_of_threads():
    """Few heads are split by queries too; no bit depends on it."""
    q, k, v = (x.detach() for x in inputs(1, 2, 150, 150, 64, torch.bfloat16))
    outputs = []
    threads = torch.get_num_threads()
    for count in (1, 2, 7):
        torch.set_num_threads(count)
        outputs.append(attention(q, k, v, "prefix", 96))
    torch.set_num_threads(threads)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_its_row(dtype, device):
    q, k, v = (x.detach() for x in inputs(1, 2, 40, 40, 32, dtype, device))
    before = attention(q, k, v)
    q[0, 1, 17, 5] = float("nan")
    after = attention(q, k, v)
    assert after[0, 1, 17].isnan().all()
    after[0, 1, 17] = before[0, 1, 17]
    assert torch.equal(after, before)


def test_hidden_keys_may_be_outliers(device):
    """Their scores reach neither the maximum nor the sum."""
    q, k, v = (x.detach() for x in inputs(1, 2, 30, 30, 32, torch.float16, device))
    real = torch.ones(1, 30, dtype=torch.bool, device=device)
    real[:, 12:17] = False
    before = attention(q, k, v, "full", 0, real)
    k[:, :, 12:17] *= 1000
    v[:, :, 12:17] = 60000
    torch.testing.assert_close(attention(q, k, v, "full", 0, real), before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outlier_channels(dtype, device):
    q, k, v = inputs(1, 2, 96, 96, 64, dtype, device)
    with torch.no_grad():
        k[..., ::24] *= 30  # scores of hundreds: a thousand would be a lookup
        v[..., ::24] *= 1000
    assert_as_accurate_as_eager(attention(q, k, v), reference.attention, q, k, v)


def test_positions_beyond_32_bits_are_copied():
    """The kernels add up 32-bit offsets of the positions, as of rows 2**30 elements apart."""
    module = pytest.importorskip("internvl_engine.kernels.triton.attention")
    near, far = (
        torch.empty_strided((1, 2, 3, 16), (0, 16, step, 1), device="meta")
        for step in (2**29, 2**30)
    )
    assert module.readable(near) is near
    assert module.readable(far).is_contiguous()


@interpreted
def test_triton_twice_the_same_bits(triton_small_tiles):
    args = (*inputs(1, 2, 45, 45, 16, torch.float16), "causal", 0, padding(1, 45))
    runs = [attention(*args) for _ in range(2)]
    grads = [torch.autograd.grad(out.sum(), args[:3]) for out in runs]
    assert torch.equal(*runs)
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 2, 0, 7), (2, 2, 5, 0)])
@pytest.mark.parametrize("backend", ["native", "sdpa", "triton"])
def test_empty(shape, backend):
    if backend not in kernels.backends("attention")["CPU"]:
        pytest.skip("triton is not interpreted here")
    with kernels.prefer("attention", backend):
        args = inputs(*shape, 16)
        out = attention(*args)
        assert out.shape == args[0].shape
        assert not out.any()
        grads = torch.autograd.grad(out.sum(), args)
        assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, args, strict=True))


def test_compiles_without_graph_breaks(device):
    args = (*inputs(2, 2, 17, 17, 16, device=device), "prefix", 5, padding(2, 17, device))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    out, expected = compiled(*args), attention(*args)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(x.square().sum(), args[:3]) for x in (out, expected)]
    torch.testing.assert_close(*grads)


def test_autocast_lowers(device):
    with torch.autocast(device, torch.bfloat16):
        assert attention(*inputs(1, 2, 9, 9, 16, device=device)).dtype == torch.bfloat16


def test_rejects_what_does_not_fit():
    q, k, v = inputs(2, 2, 9, 7, 16)
    with pytest.raises(ValueError, match="no more queries than keys"):
        attention(q, k, v, "causal")
    with pytest.raises(ValueError, match="mask must be one of"):
        attention(q, k, v, "sliding")
    with pytest.raises(ValueError, match=r"k and v \(B, Hk, T, D\)"):
        attention(q, k, v[:, :, 1:])
    with pytest.raises(ValueError, match="one dtype"):
        attention(q, k.half(), v)
    with pytest.raises(ValueError, match=r"bool of shape \(2, 7\)"):
        attention(q, k, v, key_padding_mask=torch.ones(2, 9, dtype=torch.bool))


@pytest.mark.parametrize(
    "name, wants_lse",
    [("flash_attn", "return_attn_probs"), ("flash_attn_interface", "return_attn_probs"),
     ("flash_attn.cute", "return_lse")],
)  # fmt: skip
def test_the_flash_attn_package_is_called_as_it_is_documented(name, wants_lse, monkeypatch):
    """With a stand-in that has the signature of each version: (B, S, H, D), softmax_scale, causal.

    Version 4 leaves a package flash_attn around it that has no such function.
    """

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, **more):
        assert more == {wants_lse: True}
        heads = [x.transpose(1, 2) for x in (q, k, v)]
        mask = "causal" if causal else "full"
        out = reference.attention(*heads, mask, scale=softmax_scale)
        seen = reference.attention_mask(mask, q.shape[1], k.shape[1], 0, None, "cpu")
        lse = _attention.log_sum_exp(heads[0], heads[1], seen, softmax_scale)
        return out.transpose(1, 2), lse.float(), None

    installed = {name, name.split(".")[0]}
    for each in installed:
        monkeypatch.setitem(sys.modules, each, ModuleType(each))
    sys.modules[name].flash_attn_func = flash_attn_func
    monkeypatch.setattr(_attention, "find_spec", lambda name: name in installed or None)
    _attention._flash_attn_of.cache_clear()
    q, k, v = (x.detach() for x in inputs(2, 3, 9, 9, 16, torch.float16))
    for causal in (False, True):
        out, lse = _attention.flash_attn(q, k, v, causal, 0.25)
        expected, expected_lse = torch.ops.internvl.attention(
            q, k, v, "causal" if causal else "full", 0, None, 0.25, False, True
        )
        torch.testing.assert_close(out, expected, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dim, served", [(16, True), (128, True), (136, False), (20, False)])
def test_heads_that_the_kernels_do_not_take_are_named(dim, served):
    reason = kernels.unsupported_head_dim(dim)
    assert (reason is None) == served
    assert served or f"{dim} wide; the kernels take multiples of 8 up to 128" in reason
