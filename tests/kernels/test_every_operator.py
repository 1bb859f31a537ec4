"""What holds for every operator of the library, whichever it is."""

import pytest
import torch

from internvl_engine import kernels, reference
from internvl_engine.kernels import _library


def heads(batch=2, tokens=9, dtype=torch.float32):
    return torch.randn(batch, 2, tokens, 16).to(dtype)


def forward_and_saved(operator, arguments, *last):
    """The arguments of an attention's gradient: its own, in bfloat16, and what it returned.

    Not float32: opcheck cannot see through torch.func, by which the reference computes it there.
    """
    arguments = [x.bfloat16() if isinstance(x, torch.Tensor) else x for x in arguments]
    outputs = getattr(torch.ops.internvl, operator).default(*arguments, *last, True)
    return torch.randn_like(outputs[0]), *arguments[:3], *outputs


def examples() -> dict[str, tuple]:
    """Arguments for every operator of the library; a new one fails until it has some here."""
    x, weight, bias = torch.randn(3, 8), torch.randn(6, 8), torch.randn(6)
    q, k = heads(), heads()
    qkv, norms = torch.randn(2, 9, 3, 2, 16), (torch.randn(32), torch.randn(32))
    table = reference.rotary_table(9, 16, 10000.0, torch.float32, "cpu")
    positions, lengths = torch.arange(9)[None], torch.tensor([4, 9])
    wanted = [True, True, True]
    found = {
        "rms_norm": (x, weight[0], 1e-6),
        "rms_norm_backward": (x, x, weight[0], 1e-6),
        "add_rms_norm": (x, x, weight[1], weight[0], 1e-6),
        "add_rms_norm_backward": (x, x, x, x, weight[1], weight[0], 1e-6),
        "swiglu": (x,),
        "swiglu_backward": (x[:, :4], x),
        "rotary": (q, k, *table, positions),
        "rotary_append": (q, k, k, *table, positions, positions[0], heads(), heads()),
        "linear": (x, weight, bias, "gelu", torch.randn(3, 6)),
        "linear_backward": (torch.randn(3, 6), x, weight, bias, "none", wanted),
        "attention": (q, k, k, "causal", 0, None, 0.25, True),
        "attention_backward": (
            *forward_and_saved("attention", (q, k, k), "causal", 0, None, 0.25),
            "causal", 0, None, 0.25,
        ),
        "cross_attention": (q, k[:1], k[:1], True, 0.25, True),
        "cross_attention_backward": (
            *forward_and_saved("cross_attention", (q, k[:1], k[:1]), True, 0.25), True, 0.25,
        ),
        "decode_attention": (q[:, :, :1], k, k, lengths, None, 0.25),
        "qk_norm_attention": (qkv, *norms, 1e-6, 0.25, True),
        "qk_norm_attention_backward": (
            *forward_and_saved("qk_norm_attention", (qkv, *norms), 1e-6, 0.25), 1e-6, 0.25,
        ),
        "pooling_attention": (torch.randn(2, 4, 16), torch.randn(2, 9, 16), 1e-5),
    }  # fmt: skip
    if kernels.can_pack(weight):
        packed = kernels.PackedWeight(weight).data
        found["linear_packed"] = (x, packed, 6, bias, "gelu", torch.randn(3, 6))
        backward = (torch.randn(3, 6), x, packed, 6, bias, "none", wanted[:2])
        found["linear_packed_backward"] = backward
    return found


@pytest.mark.parametrize("operator", sorted(_library._ORDER))
def test_every_operator_is_wellformed(operator):
    arguments = examples().get(operator)
    if arguments is None and "packed" in operator:
        pytest.skip("no packed layout for float32 here")
    assert arguments is not None, f"give {operator} an example above"
    checks = ("test_schema", "test_faketensor")
    if not operator.endswith("_backward"):
        checks += ("test_autograd_registration", "test_aot_dispatch_dynamic")
        if operator != "rotary_append":  # writes to its cache and has no gradient
            arguments = [as_leaf(x) for x in arguments]
    overload = getattr(torch.ops.internvl, operator).default
    torch.library.opcheck(overload, tuple(arguments), test_utils=checks)


def as_leaf(x):
    """x with a gradient where it can have one."""
    differentiable = isinstance(x, torch.Tensor) and x.is_floating_point()
    return x.detach().clone().requires_grad_() if differentiable else x


def test_every_row_has_the_same_bits_in_every_batch():
    """On the CPU no order of sums depends on the batch: an image alone and among others."""
    tokens, width = 257, 4 * 128
    x, weight = torch.randn(3, tokens, width), torch.rand(width)
    q, k = torch.randn(3, 4, 96, 128), torch.randn(3, 4, tokens, 128)
    lengths = torch.tensor([140, 140, 140])
    calls = {
        "rms_norm": lambda x, q, k, n: kernels.rms_norm(x, weight.to(x.dtype), 1e-6),
        "add_rms_norm": lambda x, q, k, n: kernels.add_rms_norm(
            x, x, None, weight.to(x.dtype), 1e-6
        )[0],
        "swiglu": lambda x, q, k, n: kernels.swiglu(x),
        "qk_norm_attention": lambda x, q, k, n: kernels.qk_norm_attention(
            torch.stack((x, x, x), 2).unflatten(-1, (4, 128)), *[weight.to(x.dtype)] * 2
        ),
        "attention": lambda x, q, k, n: kernels.attention(q, q, q, "causal"),
        "cross_attention": lambda x, q, k, n: kernels.cross_attention(q, k, k),
        "decode_attention": lambda x, q, k, n: kernels.decode_attention(q[:, :, :1], k, k, n),
        "pooling_attention": lambda x, q, k, n: kernels.pooling_attention(x[:, :4], x, 1e-5),
    }
    for dtype in (torch.float32, torch.bfloat16):
        batch = (x.to(dtype), q.to(dtype), k.to(dtype), lengths)
        for operator, call in calls.items():
            whole = call(*batch)
            for image in range(3):
                alone = call(*(tensor[image : image + 1] for tensor in batch))
                assert torch.equal(alone[0], whole[image]), (operator, dtype)
