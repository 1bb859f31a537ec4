"""Small arguments for every operator of the library."""

import torch

from internvl_engine import kernels, reference

# Operators that write to their last two tensors and have no gradient.
WRITE = ("decode_qkv", "rotary_append")
# Those, and what rounds.
WITHOUT_GRADIENT = (*WRITE, "rms_norm_quant", "gelu_quant", "linear_fp8_rows")


def heads(batch: int = 2, tokens: int = 9) -> torch.Tensor:
    return torch.randn(batch, 2, tokens, 16)


def _saved(operator: str, arguments: tuple, *last) -> tuple:
    """The arguments of an attention's gradient: its own, in bfloat16, and what it returned.

    Not float32: opcheck cannot see through torch.func, by which the reference computes it there.
    """
    arguments = tuple(x.bfloat16() if isinstance(x, torch.Tensor) else x for x in arguments)
    outputs = getattr(torch.ops.internvl, operator).default(*arguments, *last, True)
    return torch.randn_like(outputs[0]), *arguments[:3], *outputs


def has_packed_weight(operator: str) -> bool:
    """Whether the example's dtypes belong together: a packed weight's, or its scales'."""
    return any(form in operator for form in ("packed", "int4", "int8", "fp8"))


def examples() -> dict[str, tuple]:
    """By name; without the packed ones where this machine has no packed layout for float32."""
    x, weight, bias = torch.randn(3, 8), torch.randn(6, 8), torch.randn(6)
    q, k = heads(), heads()
    qkv, norms = torch.randn(2, 9, 3, 2, 16), (torch.randn(32), torch.randn(32))
    table = reference.rotary_table(9, 16, 10000.0, torch.float32, "cpu")
    positions, lengths = torch.arange(9)[None], torch.tensor([4, 9])
    quantized = kernels.quantize_fp8(weight)
    shared = (q.repeat(2, 2, 1, 1), k, k)  # by two rows and two heads
    grouped, seen = (q.repeat(1, 2, 1, 1), k, k), torch.rand(2, 1, 9, 9) > 0.3
    causal = ("causal", 0, torch.rand(2, 9) > -1, 0.25, False)
    found = {
        "rms_norm": (x, weight[0], 1e-6),
        "rms_norm_backward": (x, x, weight[0], 1e-6),
        "add_rms_norm": (x, x, weight[1], weight[0], 1e-6),
        "add_rms_norm_backward": (x, x, x, x, weight[1], weight[0], 1e-6),
        "layer_norm": (x, weight[0], weight[2], 1e-6),
        "layer_norm_backward": (x, x, weight[0], 1e-6),
        "add_layer_norm": (x, x, weight[1], weight[0], weight[2], 1e-6),
        "add_layer_norm_backward": (x, x, x, x, weight[1], weight[0], 1e-6),
        "swiglu": (x,),
        "swiglu_backward": (x[:, :4], x),
        "rotary": (q, k, *table, positions),
        "decode_qkv": (
            x[:2, None], torch.randn(48, 8), None, None, None, weight[0], None, 1e-6, 1, *table,
            positions[:, :1], positions[0, :1], heads()[:, :1], heads()[:, :1],
        ),
        "norm_linear": (
            x, weight, None, None, 6, bias, "gelu", weight[0], x.square().sum(1, True), 1e-6,
        ),
        "linear_squares": (x, weight, None, None, 6, bias, torch.randn(3, 6)),
        "rotary_append": (q, k, k, *table, positions, positions[0], heads(), heads()),
        "linear": (x, weight, bias, "gelu", torch.randn(3, 6)),
        "linear_backward": (torch.randn(3, 6), x, weight, bias, "none", [True, True, True]),
        "attention": (*shared, *causal, True),
        "attention_backward": (*_saved("attention", shared, *causal), *causal),
        "attention_with_mask": (*grouped, seen, 0.25),
        "attention_with_mask_backward": (
            *(x.bfloat16() for x in (grouped[0], *grouped)), seen, 0.25,
        ),
        "decode_attention": (q[:, :, :1], k, k, lengths, None, 0.25),
        "qk_norm_attention": (qkv, *norms, 1e-6, 0.25, True),
        "qk_norm_attention_backward": (
            *_saved("qk_norm_attention", (qkv, *norms), 1e-6, 0.25), 1e-6, 0.25,
        ),
        "rms_norm_quant": (x, weight[0], 1e-6, torch.int8),
        "gelu_quant": (x, torch.int8, "gelu"),
        "linear_fp8": (x, *quantized, bias, "gelu", torch.randn(3, 6)),
        "linear_fp8_rows": (
            *kernels.gelu_quant(x, epilogue="none"), *quantized, torch.float32, bias, "gelu",
            torch.randn(3, 6),
        ),
        "linear_fp8_backward": (torch.randn(3, 6), x, *quantized, bias, "none", [True, True]),
        "pooling_attention": (torch.randn(2, 4, 16), torch.randn(2, 9, 16), 1e-5),
    }  # fmt: skip
    in_int4 = kernels.quantize_int4(weight)
    found["linear_int4"] = (x, *in_int4, 6, bias, "gelu", torch.randn(3, 6))
    backward = (torch.randn(3, 6), x, *in_int4, 6, bias, "none", [True, True])
    found["linear_int4_backward"] = backward
    eighths = kernels.quantize_int8(weight)
    found["linear_int8"] = (x, *eighths, bias, "gelu", torch.randn(3, 6))
    backward = (torch.randn(3, 6), x, *eighths, bias, "none", [True, True])
    found["linear_int8_backward"] = backward
    if kernels.layout_of(weight):
        packed = kernels.pack(weight)
        found["linear_packed"] = (x, packed, 6, bias, "gelu", torch.randn(3, 6))
        backward = (torch.randn(3, 6), x, packed, 6, bias, "none", [True, True])
        found["linear_packed_backward"] = backward
    return found
