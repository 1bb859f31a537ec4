"""Triton's own launches on CPU tensors, for a GPU that is not there: all of it but the running.

    python tests/launches.py        (TRITON_INTERPRET unset)

The interpreter sees neither how Triton specialises a kernel for its arguments (a size of 1 becomes
a constant, a pointer or stride that is no multiple of 16 another variant) nor how often that
compiles it. Here every launcher runs under a driver that knows an H100 by name only. Prints a JSON
object: which kernels a second batch size compiles again, and what does not compile where sizes
are 1.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from triton import compile, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError
from triton.runtime.driver import driver

from internvl_engine.kernels.triton import (
    add_layer_norm,
    add_rms_norm,
    attention,
    decode_attention,
    gelu_quant,
    layer_norm,
    linear,
    linear_int4,
    linear_int8,
    pooling_attention,
    qk_norm_attention,
    rms_norm,
    rms_norm_quant,
    rotary,
    rotary_append,
    swiglu,
)
from internvl_engine.kernels.triton._tuning import OPTIONS

TARGET = GPUTarget("cuda", 90, 32)
EPS, SCALE = 1e-6, 0.125


class Driver:
    """What a launch asks of the driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextmanager
def recorded() -> Iterator[dict[str, ASTSource]]:
    """What the launches inside would compile, by name and specialisation."""
    variants = {}

    def record(*, fn, compile, **_) -> bool:
        names = fn.jit_function.arg_names
        attributes = compile["configs"][0]
        constants = {names[index]: value for (index,), value in compile["constants"].items()}
        aligned = [names[index] for (index,), value in attributes.items() if value]
        key = f"{fn.name} {compile['signature']} {constants} {aligned}"
        variants[key] = ASTSource(
            fn.jit_function, compile["signature"], compile["constants"], attributes
        )
        return True  # do not compile, do not launch

    knobs.runtime.jit_cache_hook = record
    try:
        yield variants
    finally:
        knobs.runtime.jit_cache_hook = None


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16)


def rows(batch: int, tokens: int, channels: int, features: int) -> None:
    """What sees (B, N, C) as rows."""
    x, weight = empty(batch, tokens, channels), empty(channels)
    rms_norm.rms_norm_triton(x, weight, EPS)
    rms_norm.rms_norm_backward_triton(x, x, weight, EPS)
    add_rms_norm.add_rms_norm_triton(x, x, weight, weight, EPS)
    add_rms_norm.add_rms_norm_backward_triton(x, x, x, x, weight, weight, EPS)
    layer_norm.layer_norm_triton(x, weight, weight, EPS)
    layer_norm.layer_norm_backward_triton(x, x, weight, EPS)
    add_layer_norm.add_layer_norm_triton(x, x, weight, weight, weight, EPS)
    add_layer_norm.add_layer_norm_backward_triton(x, x, x, x, weight, weight, EPS)
    y = empty(batch, tokens, features)
    linear.linear_triton(x, empty(features, channels), empty(features), "gelu", y)
    linear.linear_triton(x, empty(2 * features, channels), None, "swiglu")
    bias, residual = empty(features), y
    panels, groups = -(-features // 32), -(-channels // 64)
    eight = torch.empty(panels, -(-channels // 4), 32, 4, dtype=torch.int8)
    eight = (eight, torch.empty(features), torch.empty(features, dtype=torch.int32))
    linear_int8.linear_int8_triton(x, *eight, bias, "gelu", residual)
    four = torch.empty(panels, -(-channels // 8), 32, 4, dtype=torch.uint8)
    four = (four, torch.empty(panels, groups, 32, dtype=torch.float16))
    linear_int4.linear_int4_triton(x, *four, features, bias, "gelu", residual)
    rms_norm_quant.rms_norm_quant_triton(x, weight, EPS, torch.int8)
    gelu_quant.gelu_quant_triton(x, torch.int8)
    gate_up = empty(batch, tokens, 2 * features)
    swiglu.swiglu_triton(gate_up)
    swiglu.swiglu_backward_triton(y, gate_up)
    pooling_attention.pooling_attention_triton(empty(batch, 1, channels), x, EPS)


def heads(batch: int, tokens: int, num_heads: int, dim: int) -> None:
    """What sees (B, H, S, D), as projections lay it out, and a cache."""
    q = empty(batch, tokens, num_heads, dim).transpose(1, 2)
    cache = empty(batch, num_heads, 200, dim)
    table, places = empty(256, dim // 2), torch.zeros(1, tokens, dtype=torch.long)
    rotary.rotary_triton(q, q, table, table, places)
    rotary_append.rotary_append_triton(q, q, q, table, table, places, places[0], cache, cache)
    lengths = torch.zeros(batch, dtype=torch.long)
    decode_attention.decode_attention_triton(q[:, :, :1], cache, cache, lengths, None, SCALE)
    mask = ("prefix", 96, torch.zeros(batch, tokens, dtype=torch.bool), SCALE, False)
    out, lse = attention.attention_triton(q, q, q, *mask, True)
    attention.attention_backward_triton(q, q, q, q, out, lse, *mask)
    k = empty(batch, tokens, num_heads, dim).transpose(1, 2)
    twice = empty(2 * batch, tokens, num_heads, dim).transpose(1, 2)
    shared = ("full", 0, None, SCALE, False)
    out, lse = attention.attention_triton(twice, k, k, *shared, True)
    attention.attention_backward_triton(twice, twice, k, k, out, lse, *shared)
    qkv, weight = empty(batch, tokens, 3, num_heads, dim), empty(num_heads * dim)
    out, *saved = qk_norm_attention.qk_norm_attention_triton(qkv, weight, weight, EPS, SCALE, True)
    qk_norm_attention.qk_norm_attention_backward_triton(
        out, qkv, weight, weight, out, *saved, EPS, SCALE
    )


def compiled_again() -> list[str]:
    """The kernels that other batches than 2 and 3 compile once more, at the model's widths."""
    known: set[str] = set()
    for batch in (2, 3, 4, 16, 17, 64, 255):
        with recorded() as variants:
            rows(batch, 257, 3200, 4096)
            heads(batch, 96, 32, 128)
        again = set(variants) - known
        if known and again:
            return sorted(again)
        known |= set(variants)
    return []


def broken_at_one() -> list[str]:
    """What sees rows and does not compile where all sizes and strides are 1, so constants."""
    broken = []
    with recorded() as variants:
        rows(1, 1, 1, 1)
    for name, source in variants.items():
        try:
            compile(source, target=TARGET, options={"num_warps": 1, **OPTIONS})
        except (CompilationError, RuntimeError) as error:  # of the front end, and of the passes
            broken.append(f"{name}: {error}")
    return broken


if __name__ == "__main__":
    driver.set_active(Driver())
    json.dump({"again": compiled_again(), "broken": broken_at_one()}, sys.stdout)
