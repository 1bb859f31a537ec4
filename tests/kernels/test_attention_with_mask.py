"""Attention under masks that are tensors: whatever they say, and read rightly where simple."""

import pytest
import torch

from internvl_engine import reference
from internvl_engine.kernels import (
    _library,
    attention,
    attention_with_mask,
    decode_attention,
)

from kernel_runs import backend_in_use
from numerics import (
    assert_as_accurate_as_eager,
    assert_gradient_as_accurate_as_eager,
    assert_written,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NATIVE = _library.native is not None and _library.native.instruction_set() != "portable"
ADDITIVE = ("lowest", "infinite", "summed")


def inputs(batch, heads, key_heads, queries, keys, dim, dtype=torch.float32, device="cpu"):
    """q, k, v as projections give them: (B, S, H, D) in memory."""
    return [
        torch.randn(batch, n, h, dim, device=device).to(dtype).transpose(1, 2).requires_grad_()
        for n, h in ((queries, heads), (keys, key_heads), (keys, key_heads))
    ]


def positions(queries, keys, end=None):
    """(S, 1) places of the queries, the last of `end` keys, and (T,) of the keys."""
    end = end or keys
    return torch.arange(end - queries, end)[:, None], torch.arange(keys)


def left(keys):
    return torch.arange(keys) >= torch.tensor([[0], [keys // 3]])  # (2, T)


def causal(queries, keys):
    rows, columns = positions(queries, keys)
    return (columns <= rows)[None, None].expand(2, 1, -1, -1)


def windowed(queries, keys):
    rows, columns = positions(queries, keys)
    return causal(queries, keys) & (columns > rows - 6)


def packed(queries, keys):
    rows, columns = positions(queries, keys)
    return causal(queries, keys) & (rows // 7 == columns // 7)


MASKS = {
    "causal": causal,
    "left": lambda s, t: causal(s, t) & left(t)[:, None, None],
    "right": lambda s, t: causal(s, t) & left(t).flip(1)[:, None, None],
    "one row for all": lambda s, t: causal(s, t)[:1],
    "padding only": lambda s, t: left(t)[:, None, None].expand(-1, 1, s, -1),
    "window": windowed,
    "packed": packed,
    "static": lambda s, t: (positions(s, t, t - 9)[1] <= positions(s, t, t - 9)[0])[None, None],
    "holes": lambda s, t: torch.rand(2, 1, s, t, generator=torch.Generator().manual_seed(1)) > 0.6,
    "by head": lambda s, t: (
        torch.rand(2, 6, s, t, generator=torch.Generator().manual_seed(1)) > 0.6
    ),
    "nothing": lambda s, t: causal(s, t) & (torch.arange(2) > 0)[:, None, None, None],
}


def as_additive(seen, how, dtype):
    """What models make of a boolean mask."""
    if how == "infinite":
        return torch.zeros(seen.shape).masked_fill(~seen, float("-inf")).to(dtype)
    mask = reference.additive_mask(seen, dtype)
    return (
        mask + reference.additive_mask(seen | (torch.rand(seen.shape) > 0.5), dtype)
        if (how == "summed")
        else mask
    )


def check(*args) -> None:
    out = attention_with_mask(*args)
    assert_written(out)
    assert out.transpose(1, 2).is_contiguous()
    assert_as_accurate_as_eager(out, reference.attention_with_mask, *args)
    # A shared key's gradient is one sum over three heads: see test_shared_keys.py.
    assert_gradient_as_accurate_as_eager(
        attention_with_mask, reference.attention_with_mask, *args, slack=1.5
    )


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_boolean_masks(name, dtype, device):
    """37 keys in several tiles of queries and panels of keys; three query heads a key head."""
    check(*inputs(2, 6, 2, 29, 37, 16, dtype, device), MASKS[name](29, 37).to(device))


@pytest.mark.parametrize("how", ADDITIVE)
@pytest.mark.parametrize("name", ["left", "right", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_additive_masks_that_only_hide(name, how, dtype):
    args = [x.detach() for x in inputs(2, 6, 2, 29, 37, 16, dtype)]
    seen = MASKS[name](29, 37)
    out = attention_with_mask(*args, as_additive(seen, how, dtype))
    expected = attention_with_mask(*args, seen)
    shown = seen.any(-1).expand(-1, 6, -1)
    torch.testing.assert_close(out[shown], expected[shown], rtol=0, atol=0)
    assert_written(out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_biases_are_added(dtype, device):
    rows, columns = positions(29, 37)
    bias = (columns - rows).float() / 8 + as_additive(causal(29, 37), "lowest", torch.float32)
    check(*inputs(2, 6, 2, 29, 37, 16, dtype, device), bias.to(dtype).to(device))
    bias = torch.where(causal(29, 37), 0.0, -5.0)  # hides nothing: it weighs less
    check(*inputs(2, 6, 2, 29, 37, 16, dtype, device), bias.to(dtype).to(device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("additive", [False, True])
def test_one_query(dtype, additive, device):
    mask = left(37)[:, None, None].to(device)
    mask = reference.additive_mask(mask, dtype) if additive else mask
    check(*inputs(2, 6, 2, 1, 37, 16, dtype, device), mask)


@pytest.mark.skipif(not NATIVE, reason="the native kernels do not serve here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_that_is_described_has_the_bits_of_its_description(dtype):
    q, k, v = (x.detach() for x in inputs(2, 6, 2, 29, 37, 16, dtype))
    real = left(37)
    with torch.no_grad():
        found = attention_with_mask(q, k, v, MASKS["left"](29, 37))
        assert torch.equal(found, attention(q, k, v, "causal", 0, real))
        found = attention_with_mask(q[:, :, -1:], k, v, MASKS["left"](29, 37)[:, :, -1:])
        assert torch.equal(found, decode_attention(q[:, :, -1:], k, v, None, real))


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("name", ["left", "window", "nothing"])
def test_other_backends(backend, name):
    with backend_in_use("attention_with_mask", backend):
        check(*inputs(2, 6, 2, 13, 21, 16), MASKS[name](13, 21))


@pytest.mark.parametrize("shape", [(0, 6, 2, 5, 7), (2, 6, 2, 0, 7), (2, 6, 2, 5, 0)])
def test_empty(shape):
    args = inputs(*shape, 16)
    mask = torch.ones(shape[0], 1, *shape[3:], dtype=torch.bool)
    out = attention_with_mask(*args, mask)
    assert out.shape == args[0].shape and not out.any()
    grads = torch.autograd.grad(out.sum(), args)
    assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, args, strict=True))


def test_strided_masks():
    """A slice of a longer cache's mask, and one whose keys are not adjacent."""
    args = inputs(2, 6, 2, 9, 13, 16)
    seen = torch.rand(2, 1, 9, 40) > 0.4
    check(*args, seen[..., 3:16])
    check(*args, reference.additive_mask(seen, torch.float32)[..., 3:16])
    check(*args, (torch.rand(2, 1, 13, 9) > 0.4).mT)


def test_rejects_what_does_not_fit():
    q, k, v = (x.detach() for x in inputs(2, 6, 2, 9, 13, 16))
    mask = torch.ones(2, 1, 9, 13, dtype=torch.bool)
    for wrong in (mask[:, :, :8], mask[:, 0], mask.expand(-1, 2, -1, -1), mask[..., :12]):
        with pytest.raises(ValueError, match=r"mask \(B or 1, H or 1, S, T\)"):
            attention_with_mask(q, k, v, wrong)
    with pytest.raises(ValueError, match="one dtype"):
        attention_with_mask(q.half(), k, v, mask)
    with pytest.raises(ValueError, match="bool or floating, got torch.int64"):
        attention_with_mask(q, k, v, mask.long())
    with pytest.raises(ValueError, match="has no gradient"):
        attention_with_mask(q, k, v, torch.zeros(2, 1, 9, 13, requires_grad=True))
