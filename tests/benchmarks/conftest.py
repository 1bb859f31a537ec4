"""Benchmarks in milliseconds: tiny shapes, and nothing is compiled."""

import pytest
from benchmark_cases import PEAKS

from internvl_engine.benchmarks import (
    bench_add_layer_norm,
    bench_attention,
    bench_attention_with_mask,
    bench_cross_attention,
    bench_decode_attention,
    bench_decode_qkv,
    bench_gelu_quant,
    bench_layer_norm,
    bench_linear,
    bench_linear_int4,
    bench_linear_int8,
    bench_linear_squares,
    bench_norm_linear,
    bench_pooling_attention,
    bench_qk_norm_attention,
    bench_rms_norm,
    bench_rotary,
    bench_rotary_append,
    bench_swiglu,
    cases,
    report,
)

HEADS = {"HEADS": 2, "DIM": 32}
SMALL = {
    bench_layer_norm: {"SHAPES": {"one": (9, 64)}},
    bench_add_layer_norm: {"SHAPES": {"InternViT": (9, 64), "CLIP": (5, 64)}},
    bench_rms_norm: {"SHAPES": {"vision": (9, 64), "QLLaMA": (5, 64)}},
    bench_gelu_quant: {"SHAPES": {"vision": ((9, 64), "gelu"), "QLLaMA": ((5, 64), "swiglu")}},
    bench_swiglu: {"SHAPES": {"one": (9, 64)}},
    bench_rotary: {"SHAPES": {"one": (1, 9)}, **HEADS},
    bench_rotary_append: {"SHAPES": {"one": (1, 9)}, **HEADS},
    bench_attention: {
        "SHAPES": {
            "image": (1, 6, "full", False),
            "prefill": (1, 10, "prefix", False),
            "block": (2, 86, "block", True),
        },
        "QUERIES": 6,
        **HEADS,
    },
    bench_attention_with_mask: {
        "SHAPES": {"prefill": (9, 4)}, "TOKENS": 9, "PADDING": 3, "HEADS": 4, "KEY_HEADS": 2,
        "DIM": 32,
    },
    bench_cross_attention: {
        "SHAPES": {"one": (1, 1, 9), "three rows": (2, 3, 9)}, "QUERIES": 5, **HEADS,
    },
    bench_decode_attention: {"SHAPES": {"one": (2, 17)}, "SLOTS": 24, **HEADS},
    bench_pooling_attention: {"SHAPES": {"one": (2, 9, 64)}, "HEADS": 3},
    bench_qk_norm_attention: {"SHAPES": {"cpu": {"one": (2, 17)}}, **HEADS},
    bench_norm_linear: {"SHAPES": {"one": (2, 128, "swiglu")}, "WIDTH": 64},
    bench_linear_squares: {"SHAPES": {"one": (2, 128)}, "WIDTH": 64},
    bench_decode_qkv: {"SHAPES": {"one": 2}, "WIDTH": 64, "SLOTS": 150, **HEADS},
    bench_linear: {
        "LAYERS": {
            "vision fc1": ((64, 96), "gelu", True),
            "QLLaMA gate_up": ((64, 128), "swiglu", False),
            "cross k": ((64, 96), "none", False),
        },
        "ROWS": {"vision": (9,), "QLLaMA": (1,), "cross": (5,)},
    },
    bench_linear_int4: {"ROWS": (1,)},
    bench_linear_int8: {"ROWS": {"vision": (9,), "QLLaMA": (1,)}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Tiny shapes, nothing compiled, peaks that nobody measured."""
    for module, constants in SMALL.items():
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value)
    for module in (cases, bench_attention, bench_qk_norm_attention):
        monkeypatch.setattr(module, "compile_anew", lambda function: function)
    monkeypatch.setattr(report, "peaks", lambda *_: PEAKS)
