"""Others' gradients of attention (FlashAttention's, cuDNN's) around ours: without a GPU, so with
what they compute in their place; and PyTorch's own checks of how they are called."""

from importlib import import_module

import pytest
import torch

from internvl_engine import reference
from internvl_engine.kernels import _attention

from numerics import assert_as_accurate_as_eager

EPS, SCALE = 1e-6, 0.25


def differentiate(grad, q, k, v, out, lse, causal, scale):
    """What FlashAttention's backward computes from what the forward saved, in fp32."""
    assert lse.dtype == torch.float32 and lse.shape == q.shape[:3] and lse.is_contiguous()
    assert q.shape == grad.shape == out.shape
    grad, q, k, v, out = (x.float() for x in (grad, q, k, v, out))
    scores = q @ k.transpose(-2, -1) * scale
    if causal:
        seen = reference.attention_mask("causal", q.shape[2], k.shape[2], 0, None, "cpu")
        scores = scores.masked_fill(~seen, float("-inf"))
    p = (scores - lse[..., None]).exp()
    d_scores = p * (grad @ v.transpose(-2, -1) - (grad * out).sum(-1, keepdim=True)) * scale
    found = d_scores @ k, d_scores.transpose(-2, -1) @ q, p.transpose(-2, -1) @ grad
    return _attention.AttentionGradients(*(x.to(torch.float16) for x in found))


def backend(module: str):
    made = import_module(f"internvl_engine.kernels.{module}")
    return made._flash_backward_backend(differentiate)


@pytest.mark.parametrize("norm", [True, False])
def test_qk_norm_attention(norm):
    qkv = torch.randn(2, 9, 3, 2, 16, dtype=torch.float16, requires_grad=True)
    weights = [None, None]
    if norm:
        weights = [(torch.rand(32) + 0.5).half().requires_grad_() for _ in range(2)]
    operator = torch.ops.internvl.qk_norm_attention.default
    saved = [x.detach() for x in operator(qkv, *weights, EPS, SCALE, True)]
    grad = torch.randn_like(saved[0])
    leaves = [x for x in (qkv, *weights) if x is not None]
    inputs = [None if x is None else x.detach() for x in (qkv, *weights)]
    found = backend("qk_norm_attention")(grad, *inputs, *saved, EPS, SCALE)
    found = [x for x in found if x.numel() > 0]
    assert len(found) == len(leaves)

    def eager(qkv, *weights):
        weights = weights or (None, None)
        leaves = [x.detach().requires_grad_() for x in (qkv, *weights) if x is not None]
        rest = leaves[1:] or [None, None]
        out = reference.qk_norm_attention(leaves[0], *rest, EPS, SCALE)
        return torch.autograd.grad(out, leaves, grad.to(out.dtype))

    assert_with_gradients(found, eager, *[x.detach() for x in leaves])


def assert_with_gradients(found, eager, *inputs):
    """As accurate as eager's own gradients, which need autograd inside of the comparison."""

    def run(*args):
        with torch.enable_grad():
            return eager(*args)

    # Sums of a few rounded products: a third more than eager, whose rounding is elsewhere.
    assert_as_accurate_as_eager(found, run, *inputs, slack=1.6)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("interleave", [False, True])
def test_attention_of_rows_and_heads_that_share_keys(mask, interleave):
    shares = mask == "full"
    q = torch.randn(4 if shares else 2, 4 if shares else 2, 9, 16, dtype=torch.float16)
    k, v = (torch.randn(2, 2, 9, 16, dtype=torch.float16) for _ in range(2))
    rest = (mask, 0, None, SCALE, interleave)
    out, lse = torch.ops.internvl.attention.default(q, k, v, *rest, True)
    grad = torch.randn_like(out)
    found = backend("attention")(grad, q, k, v, out, lse, *rest)

    def eager(q, k, v):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = reference.attention(*leaves, mask, 0, None, SCALE, interleave)
        return torch.autograd.grad(out, leaves, grad.to(out.dtype))

    assert_with_gradients(found, eager, q, k, v)
    for gradient, x in zip(found, (q, k, v), strict=True):
        assert gradient.shape == x.shape and gradient.transpose(1, 2).is_contiguous()


def test_what_they_do_not_know_is_left_to_others():
    q = torch.randn(2, 2, 9, 16, dtype=torch.float16)
    out, lse = torch.ops.internvl.attention.default(q, q, q, "full", 0, None, SCALE, False, True)
    run, rest = backend("attention"), (SCALE, False)
    padding = torch.ones(2, 9, dtype=torch.bool)
    assert run(out, q, q, q, out, lse, "full", 0, padding, *rest) is NotImplemented
    assert run(out, q, q, q, out, lse, "prefix", 3, None, *rest) is NotImplemented
    wide = q.float()
    assert run(wide, wide, wide, wide, wide, lse, "full", 0, None, *rest) is NotImplemented
    qkv = torch.randn(2, 9, 3, 2, 16)
    run = backend("qk_norm_attention")
    assert run(qkv[:, :, 0], qkv, None, None, None, None, None, EPS, SCALE) is NotImplemented


@pytest.mark.parametrize("name", sorted(_attention.FLASH_BACKWARD))
def test_pytorch_takes_the_arguments(name):
    q, k = (torch.empty(2, 3, n, 32, dtype=torch.bfloat16, device="meta") for n in (9, 11))
    lse = torch.empty(2, 3, 9, device="meta")
    found = _attention.FLASH_BACKWARD[name](q, q, k, k, q, lse, False, SCALE)
    assert [x.shape for x in found] == [q.shape, k.shape, k.shape]
