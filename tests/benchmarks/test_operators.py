"""The operators' cases: what they count, and that everybody in them computes the same."""

import json
import sys
from types import ModuleType

import pytest
import torch
from benchmark_cases import ON_CPU, SHORT
from torch.utils.flop_counter import FlopCounterMode

from internvl_engine import kernels as operators
from internvl_engine import reference
from internvl_engine.benchmarks import cases, kernels, report, timing
from internvl_engine.kernels import _library

# FlexAttention is not compiled here.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@torch.no_grad()
def cases_of(*names: str) -> list[cases.Case]:
    return [case for make in kernels.suites(names).values() for case in make("cpu")]


# Bytes and operations by hand at the tiny shapes, of bfloat16 where an operator is timed in both.
# 9 x 64 or 5 x 64 rows: 576 or 320 elements. Attention: 6 queries, 2 heads of 32: q has 384.
COUNTS = {
    "rms_norm vision, forward": (2 * (2 * 576 + 64), 0),  # x, y; weight
    "rms_norm vision, backward": (2 * (3 * 576 + 2 * 64), 0),  # grad, x, dx; weight, its gradient
    "add_rms_norm vision, forward": (2 * (4 * 576 + 2 * 64), 0),  # x, residual, sum, y; scale too
    # both gradients, x, sum, dx, d residual; two vectors and their gradients
    "add_rms_norm vision, backward": (2 * (6 * 576 + 4 * 64), 0),
    "add_rms_norm QLLaMA, forward": (2 * (4 * 320 + 64), 0),
    "add_rms_norm QLLaMA, backward": (2 * (4 * 320 + 2 * 64), 0),  # one dx serves both, no x
    "layer_norm one, forward": (2 * (2 * 576 + 2 * 64), 0),  # weight and bias
    "layer_norm one, backward": (2 * (3 * 576 + 3 * 64), 0),  # weight, both gradients
    "add_layer_norm InternViT, forward": (2 * (4 * 576 + 3 * 64), 0),
    "add_layer_norm InternViT, backward": (2 * (6 * 576 + 5 * 64), 0),
    "add_layer_norm CLIP, forward": (2 * (4 * 320 + 2 * 64), 0),
    "add_layer_norm CLIP, backward": (2 * (4 * 320 + 3 * 64), 0),
    "swiglu one, forward": (2 * (576 + 288), 0),
    "swiglu one, backward": (2 * (288 + 576 + 576), 0),
    "rotary one": (2 * (4 * 576 + 2 * 9 * 16), 0),  # q, k read and written; cos and sin
    "rotary_append one": (2 * (6 * 576 + 2 * 9 * 16), 0),
    "attention image, forward": (2 * 4 * 384, 2 * 2 * 6 * 6 * 32 * 2),  # two products, two heads
    "attention image, backward": (2 * 8 * 384, 5 * 2 * 6 * 6 * 32 * 2),
    # 6 x 6 pairs, and 6 + 7 + 8 + 9 + 10 - 6 of the four that follow
    "attention prefill, forward": (2 * 4 * 640, 2 * 2 * (36 + 7 + 8 + 9 + 10) * 32 * 2),
    "cross_attention three rows, forward": (  # 6 rows of 5 queries, 2 images of 9 keys
        2 * (2 * 6 * 5 * 64 + 2 * 2 * 9 * 64), 2 * 2 * 6 * 5 * 9 * 64,
    ),
    "cross_attention three rows, backward": (
        2 * (4 * 6 * 5 * 64 + 4 * 2 * 9 * 64), 5 * 2 * 6 * 5 * 9 * 64,
    ),
    # q, k, v, out and the mask; 51 pairs are seen
    "attention_with_mask prefill, bfloat16": (
        2 * (2 * 2 * 9 * 4 * 32 + 2 * 2 * 9 * 2 * 32) + 2 * 9 * 9, 4 * 4 * 32 * 51,
    ),
    "decode_attention one": (2 * (2 * 2 * 17 * 64 + 2 * 2 * 64), 2 * 2 * 2 * 17 * 64),
    "pooling_attention one": (2 * (2 * 9 * 64 + 2 * 2 * 3 * 64), 2 * 2 * 2 * 3 * 9 * 64),
    "qk_norm_attention one, forward": (2 * 4 * 2 * 17 * 64, 2 * 2 * 2 * 17 * 17 * 64),
    "qk_norm_attention one, backward": (2 * 8 * 2 * 17 * 64, 5 * 2 * 2 * 17 * 17 * 64),
    # x, weight, bias, residual, y
    "linear vision fc1, 9 rows": (2 * (576 + 96 * 64 + 96 + 2 * 9 * 96), 2 * 9 * 96 * 64),
    "linear QLLaMA gate_up, 1 rows": (2 * (64 + 128 * 64 + 64), 2 * 128 * 64),
    # the weight: two bytes a value, or one and four a row, or a half and two a row and group
    "norm_linear one, wide": (2 * 128 * 64, 0),
    "norm_linear one, int8": (128 * 64 + 4 * 128, 0),
    "norm_linear one, int4": (128 * 32 + 2 * 128, 0),
    "linear_squares one, int4": (64 * 64 + 2 * 2 * 64, 0),
    "decode_qkv one, wide": (2 * 192 * 64, 0),
    "rms_norm_quant vision, int8": (3 * 576 + 2 * 64 + 4 * 9, 0),  # x, q; weight; scales
    "gelu_quant QLLaMA, int8": (2 * 320 + 160 + 4 * 5, 0),
    # four bits a weight, two bytes a scale of each row and group; x and y
    "linear_int4 QLLaMA gate_up, 1 rows": (128 * 64 // 2 + 2 * 128 + 2 * (64 + 64), 2 * 128 * 64),
    # one byte a weight, four a scale and four a sum
    "linear_int8 vision fc1, 9 rows": (2 * (576 + 2 * 9 * 96) + 96 * 64 + 8 * 96, 2 * 9 * 96 * 64),
    # one byte a weight, four a scale
    "linear_fp8 vision fc1, 9 rows": (2 * (576 + 2 * 9 * 96) + 96 * 64 + 4 * 96, 2 * 9 * 96 * 64),
}  # fmt: skip


def test_bytes_and_operations_are_those_counted_by_hand():
    found = {f"{case.operator} {case.label}": case for case in cases_of()}  # bfloat16 comes last
    assert set(COUNTS) <= set(found)
    assert {found[name].operator for name in COUNTS} == set(kernels.operators())
    assert {name: (found[name].bytes, found[name].flops) for name in COUNTS} == COUNTS


def test_operations_are_those_that_torch_counts():
    timed = (
        "linear",
        "linear_fp8",
        "linear_int4",
        "linear_int8",
        "qk_norm_attention",
        "cross_attention",
        "decode_attention",
    )
    some = [case for case in cases_of(*timed) if "backward" not in case.label]
    for case in some:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            case.providers["eager"].run()
        every_slot = 24 / 17 if case.operator == "decode_attention" else 1
        assert counter.get_total_flops() == pytest.approx(case.flops * every_slot), case.label


RIVALS = {
    "rms_norm": {"F.rms_norm"},
    "add_rms_norm": {"F.rms_norm"},
    "attention": {"SDPA", "FlexAttention"},
    "cross_attention": {"SDPA"},
    "decode_attention": {"SDPA, valid keys"},
    "linear": {"F.linear alone"},
    "linear_fp8": {"F.linear in 16 bits"},
    "linear_int4": {"ours, wide", "PyTorch int4"},
    "linear_int8": {"ours, wide", "_int_mm alone"},
    "rms_norm_quant": {"rms_norm alone"},
    "gelu_quant": {"the activation alone"},
    "pooling_attention": {"F.layer_norm, SDPA"},
    "qk_norm_attention": {"SDPA, no norms", "FlexAttention"},
}


def has_native(operator: str) -> bool:
    """Whether a native kernel serves it here; attention has none without vector instructions."""
    attends = operator.endswith("attention") and operator not in (
        "decode_attention",
        "pooling_attention",
    )
    name = "attention" if operator == "cross_attention" else operator
    if "native" not in operators.backends(name)["CPU"]:
        return False
    return not attends or _library.native.instruction_set() != "portable"


@ON_CPU
def test_everybody_computes_the_same_and_is_timed(tmp_path):
    file = tmp_path / "rows.json"
    found = report.measure(kernels.suites(), effort=SHORT, json_file=file)
    assert not found.failed
    for operator in kernels.operators():
        names = {row.provider for row in found.rows if row.operator == operator}
        assert {"eager", "torch.compile"} | RIVALS.get(operator, set()) <= names
        assert ("ours (native)" in names) == has_native(operator)
    stored = json.loads(file.read_text())
    assert stored["machine"] == timing.machine("cpu") and set(stored["peaks"]) == {
        "float32", "bfloat16",
    }  # fmt: skip
    needed = "operator shape dtype device provider median_ms p20_ms p80_ms bytes flops".split()
    for row in stored["rows"]:
        assert set(needed) <= set(row) and 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["speed"] > 0 and (row["share_of_peak"] is None or row["share_of_peak"] > 0)


def stand_in(monkeypatch, module: str, **functions) -> None:
    """A package in place of one that is not installed here."""
    package = ModuleType(module)
    for name, function in functions.items():
        setattr(package, name, function)
    for parent in (module.rsplit(".", count)[0] for count in range(1, module.count(".") + 1)):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, module, package)


def test_liger_is_called_as_it_is_documented(monkeypatch):
    """With the signatures of version 0.8, and what they compute."""

    def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        assert not in_place and X.is_contiguous()
        return reference.rms_norm(X, W, eps)

    def liger_fused_add_rms_norm(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        assert not in_place
        return reference.add_rms_norm(X, R, None, W, eps)

    def liger_swiglu(a, b):
        assert a.is_contiguous() and b.is_contiguous()
        return torch.nn.functional.silu(a) * b

    def liger_rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
        assert cos.shape == (1, q.shape[2], q.shape[3])
        half = q.shape[-1] // 2
        return reference.rotary(
            q, k, cos[0, :, :half], sin[0, :, :half], torch.arange(len(cos[0]))[None]
        )

    class LigerFusedGateUpSiLUMulFunction:
        apply = staticmethod(reference.swiglu)

    functions = (liger_rms_norm, liger_fused_add_rms_norm, liger_swiglu, liger_rope)
    named = {function.__name__: function for function in functions}
    stand_in(monkeypatch, "liger_kernel.transformers.functional", **named)
    merged = LigerFusedGateUpSiLUMulFunction
    stand_in(monkeypatch, "liger_kernel.ops.swiglu", **{merged.__name__: merged})
    found = [
        (case, name)
        for case in cases_of("rms_norm", "add_rms_norm", "swiglu", "rotary")
        for name in case.providers
        if name.startswith("Liger")
    ]
    with torch.no_grad():
        assert not [timing.failures(case) for case, _ in found if timing.failures(case)]
    called = {(case.operator, case.label.partition(", ")[2], name) for case, name in found}
    assert called == {
        ("rms_norm", "forward", "Liger"), ("rms_norm", "backward", "Liger"),
        ("add_rms_norm", "forward", "Liger"), ("add_rms_norm", "backward", "Liger"),
        ("swiglu", "forward", "Liger, merged"), ("swiglu", "backward", "Liger, merged"),
        ("swiglu", "forward", "Liger, apart"), ("rotary", "", "Liger"),
    }  # fmt: skip


def test_flash_attn_decodes_as_it_is_documented(monkeypatch):
    def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, cache_seqlens=None):
        assert cache_seqlens.dtype == torch.int32 and q.shape[1] == 1
        heads = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
        return reference.decode_attention(*heads, cache_seqlens).transpose(1, 2)

    stand_in(monkeypatch, "flash_attn", flash_attn_with_kvcache=flash_attn_with_kvcache)
    (case,) = cases_of("decode_attention")
    assert "flash-attn" in case.providers
    with torch.no_grad():
        assert not timing.failures(case)
