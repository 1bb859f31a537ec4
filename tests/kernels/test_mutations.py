"""Kernels broken on purpose, one small mistake each: the checks of this suite must see every one.

A mutant is a copy of the Triton files with one line changed, run interpreted. It is caught where
the comparison that the tests use fails; a mutant that passes would mean that the tests prove
nothing.
"""

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("mutants run interpreted", allow_module_level=True)

from internvl_engine import reference
from internvl_engine.kernels import (
    _autograd,
    dequantize_int4,
    dequantize_int8,
    quantize_int4,
    quantize_int8,
)

from numerics import assert_as_accurate_as_eager

KERNELS = Path(__file__).parents[2] / "kernels" / "triton"
PACKAGE = "internvl_engine.kernels.triton_mutant"
EPS = 1e-2  # large enough to matter at values of 1
SLACK = 2.0  # over so few values chance decides whose roundings are better; mutants are far off
TILES = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}  # few keys are many blocks


@contextmanager
def mutant(operator: str, file: str, old: str, new: str, folder: Path) -> Iterator[ModuleType]:
    """The module of an operator, in a copy of the whole folder with `old` replaced in one file."""
    shutil.copytree(KERNELS, folder / "triton_mutant", ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "triton_mutant" / f"{file}.py"
    source = path.read_text()
    assert old in source, f"{file}.py no longer contains {old!r}"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(PACKAGE, path.parent / "__init__.py")
    sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)  # its relative imports resolve
    try:
        yield importlib.import_module(f"{PACKAGE}.{operator}")
    finally:
        for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
            del sys.modules[name]


def check_rms_norm(module):
    x, weight = torch.randn(70, 41, dtype=torch.float16), torch.randn(41, dtype=torch.float16)
    y = module.rms_norm_triton(x[:, :40], weight[:40], EPS)
    assert_as_accurate_as_eager(y, reference.rms_norm, x[:, :40], weight[:40], EPS, slack=1.05)


def check_rms_norm_backward(module):
    grad, x, weight = torch.randn(70, 40), torch.randn(70, 40), torch.randn(40)
    actual = module.rms_norm_backward_triton(grad, x, weight, EPS)
    expected = _autograd.gradient(reference.rms_norm, (0, 1))
    assert_as_accurate_as_eager(actual, expected, grad, x, weight, EPS)


def check_add_rms_norm(module):
    x, residual, scale, weight = (torch.randn(s) for s in ((70, 40), (70, 40), 40, 40))
    actual = module.add_rms_norm_triton(x, residual, scale, weight, EPS)
    assert_as_accurate_as_eager(actual, reference.add_rms_norm, x, residual, scale, weight, EPS)


def check_add_rms_norm_backward(module):
    grads = tuple(torch.randn(70, 40) for _ in range(2))
    x, residual, scale, weight = (torch.randn(s) for s in ((70, 40), (70, 40), 40, 40))
    y = residual + x * scale
    dx, dresidual, dscale, dweight = module.add_rms_norm_backward_triton(
        *grads, x, y, scale, weight, EPS
    )
    expected = _autograd.gradient(reference.add_rms_norm, (0, 1, 2, 3))
    actual = (dx, dresidual, dscale, dweight)
    assert_as_accurate_as_eager(actual, expected, *grads, x, residual, scale, weight, EPS)


def check_linear_int8(module):
    """SwiGLU of 35 columns: `up` begins inside of a panel."""
    x, quantized = torch.randn(20, 70), quantize_int8(torch.randn(70, 70))
    y = module.linear_int8_triton(x, *quantized, torch.ones(70), "swiglu")
    weight = dequantize_int8(*quantized[:2], 70, torch.float32)
    args = (x, weight, torch.ones(70), "swiglu")
    assert_as_accurate_as_eager(y, reference.linear, *args, slack=SLACK)


def check_linear_int4(module):
    x, quantized = torch.randn(20, 140), quantize_int4(torch.randn(70, 140))
    y = module.linear_int4_triton(x, *quantized, 70, torch.ones(70), "swiglu")
    weight = dequantize_int4(*quantized, 70, 140, torch.float32)
    args = (x, weight, torch.ones(70), "swiglu")
    assert_as_accurate_as_eager(y, reference.linear, *args, slack=SLACK)


def check_rms_norm_quant(module):
    x, weight = torch.randn(5, 40), torch.rand(40)
    q, scales = module.rms_norm_quant_triton(x, weight, EPS, torch.int8)
    wanted = reference.rms_norm(x, weight, EPS)
    error = (q * scales[:, None] - wanted).abs() / scales[:, None]
    assert error.max() <= 0.501, f"error of {error.max():.3f} steps"


def layer_norm_inputs(*shapes):
    """Far enough from zero that one subtraction of the mean is not enough."""
    return (torch.randn(70, 40) + 1e4, *(torch.randn(shape) for shape in shapes))


def check_layer_norm(module):
    args = (*layer_norm_inputs(40, 40), EPS)
    assert_as_accurate_as_eager(
        module.layer_norm_triton(*args), reference.layer_norm, *args, slack=0.2
    )


def check_layer_norm_backward(module):
    x, grad, weight, bias = layer_norm_inputs((70, 40), 40, 40)
    actual = module.layer_norm_backward_triton(grad, x, weight, EPS)
    expected = _autograd.gradient(reference.layer_norm, (0, 1, 2))
    assert_as_accurate_as_eager(actual, expected, grad, x, weight, bias, EPS, slack=0.5)


def check_add_layer_norm_backward(module):
    grads = tuple(torch.randn(70, 40) for _ in range(2))
    x, residual, scale, weight, bias = (torch.randn(s) for s in ((70, 40), (70, 40), 40, 40, 40))
    y = residual + x * scale
    actual = module.add_layer_norm_backward_triton(*grads, x, y, scale, weight, EPS)
    expected = _autograd.gradient(reference.add_layer_norm, (0, 1, 2, 3, 4))
    args = (*grads, x, residual, scale, weight, bias, EPS)
    assert_as_accurate_as_eager(actual, expected, *args)


def check_rotary(module):
    q, k = torch.randn(2, 3, 4, 20), torch.randn(2, 3, 4, 20)
    cos, sin = reference.rotary_table(50, 20, 10000.0, torch.float32, "cpu")
    args = (q, k, cos, sin, torch.randint(1, 50, (2, 4)))
    assert_as_accurate_as_eager(module.rotary_triton(*args), reference.rotary, *args)


def check_swiglu(module):
    gate_up = torch.randn(3, 2 * 1100)
    assert_as_accurate_as_eager(module.swiglu_triton(gate_up), reference.swiglu, gate_up)


def check_swiglu_backward(module):
    args = (torch.randn(3, 1100), torch.randn(3, 2 * 1100))
    expected = _autograd.gradient(reference.swiglu, (0,))
    assert_as_accurate_as_eager(module.swiglu_backward_triton(*args), expected, *args)


def check_linear(module):
    x, weight, residual = torch.randn(40, 24), torch.randn(2 * 40, 24), torch.randn(40, 40)
    args = (x, weight, torch.randn(2 * 40), "swiglu", residual)
    config = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP_M": 2}
    assert_as_accurate_as_eager(module.linear_triton(*args, config), reference.linear, *args)


def heads(*sizes: int) -> list[torch.Tensor]:
    """One image's (1, 2, S, 24) for every S, as projections lay them out."""
    return [torch.randn(1, size, 2, 24).transpose(1, 2) for size in sizes]


def attention_inputs():
    """Left padding: text after the prefix of 19 sees nothing of it, and its first rows nothing."""
    real = torch.rand(1, 45) > 0.2
    real[:, 19:23] = False
    return (*heads(45, 45, 45), "block", 19, real)


def check_attention(module):
    args = attention_inputs()
    out, _ = module.attention_triton(*args, 24**-0.5, False, True, TILES)
    assert_as_accurate_as_eager(out, reference.attention, *args, slack=SLACK)


def check_attention_backward(module):
    q, k, v, *mask = attention_inputs()
    mask = (*mask, 24**-0.5, False)
    out, lse = module.attention_triton(q, k, v, *mask, True, TILES)
    args = (torch.randn_like(out), q, k, v)
    actual = module.attention_backward_triton(*args, out, lse, *mask, (TILES, TILES))

    def attend(q, k, v):
        return reference.attention(q, k, v, *mask)

    assert_as_accurate_as_eager(actual, _autograd.gradient(attend, (0, 1, 2)), *args, slack=SLACK)


def shared_heads():
    """Two rows an image and two heads a key head; some keys for each of the masked rows."""
    q = torch.randn(2, 4, 13, 24)
    return q, *(torch.randn(1, 2, 45, 24) for _ in range(2)), "causal", 0, None


def check_shared_keys(module):
    args = shared_heads()
    out, _ = module.attention_triton(*args, 24**-0.5, False, False, TILES)
    assert_as_accurate_as_eager(out, reference.attention, *args, slack=SLACK)


def check_shared_keys_backward(module):
    q, k, v, *mask = shared_heads()
    mask = (*mask, 24**-0.5, False)
    out, lse = module.attention_triton(q, k, v, *mask, True, TILES)
    args = (torch.randn_like(out), q, k, v)
    actual = module.attention_backward_triton(*args, out, lse, *mask, (TILES, TILES))

    def attend(q, k, v):
        return reference.attention(q, k, v, "causal")

    assert_as_accurate_as_eager(actual, _autograd.gradient(attend, (0, 1, 2)), *args, slack=SLACK)


def check_split_keys(module):
    args = heads(20, 77, 77)
    out, _ = module.attention_triton(*args, "full", 0, None, 24**-0.5, False, False, TILES)
    assert_as_accurate_as_eager(out, reference.attention, *args, slack=SLACK)


def check_decode_attention(module):
    q, k, v = heads(1, 40, 40)
    args = (q, k, v, torch.tensor([33]))
    out = module.decode_attention_triton(*args, None, 24**-0.5, {"BLOCK_N": 16})
    assert_as_accurate_as_eager(out, reference.decode_attention, *args, slack=SLACK)


def check_qk_norm_attention(module):
    """33 tokens: the last key is peeled off whole blocks of 16, the last row gets its own tile."""
    qkv, q_weight, k_weight = torch.randn(1, 33, 3, 2, 16), torch.rand(32), torch.rand(32)
    args = (qkv, q_weight, k_weight, EPS)
    out, *_ = module.qk_norm_attention_triton(*args, 0.25, True, TILES)
    assert_as_accurate_as_eager(out, reference.qk_norm_attention, *args, slack=SLACK)


def check_qk_norm_attention_backward(module):
    qkv, q_weight, k_weight = torch.randn(1, 33, 3, 2, 16), torch.rand(32), torch.rand(32)
    out, *saved = module.qk_norm_attention_triton(qkv, q_weight, k_weight, EPS, 0.25, True, TILES)
    args = (torch.randn_like(out), qkv, q_weight, k_weight)
    actual = module.qk_norm_attention_backward_triton(*args, out, *saved, EPS, 0.25, TILES, TILES)

    def attend(qkv, q_weight, k_weight):
        return reference.qk_norm_attention(qkv, q_weight, k_weight, EPS)

    assert_as_accurate_as_eager(actual, _autograd.gradient(attend, (0, 1, 2)), *args, slack=SLACK)


def check_pooling_attention(module):
    args = (torch.randn(1, 3, 200), torch.randn(1, 20, 200), EPS)
    actual = module.pooling_attention_triton(*args)
    assert_as_accurate_as_eager(actual, reference.pooling_attention, *args)


MASK = "(rows < num_rows) & (cols < C)\n    start"
CENTRED = "    return tl.where(mask, x - tl.div_rn(tl.sum(x, axis=1)[:, None], C), 0.0)"
DBIAS = "add_exactly(dbias, dbias_lost, grad)"
GATE = "start + F + cols, mask=mask, other=0.0).to(tl.float32)\n    y"
ROUNDED = "(x * rstd).to(DTYPE).to(tl.float32)"
NOTHING_SEEN = "tl.min(tl.where(empty, positions, S), axis=0)"
ALIKE = 'tl.where((lse == float("-inf"))[None, :], alike, p)'
UP_TO = "tl.minimum(prefix, T), position + 1)"
ONE = "tl.full([BLOCK_M], 1.0"
FACTOR = "scores *= tl.load(k_rstd_ptr + keys)[None, :]"
# By file: the check, what is replaced, by what.
MUTATIONS = {
    "_norm": [
        (check_rms_norm, "reciprocal_rms(x, C, eps)", "reciprocal_rms(x, C, 0.0)"),
        (check_rms_norm, MASK, MASK.replace("< C", "< C - 1")),
        (check_rms_norm, MASK, MASK.replace("num_rows", "num_rows - 1")),
        (check_rms_norm, ROUNDED, "(x * rstd).to(tl.float32) + 0.001"),
        (check_rms_norm, "x_inner, x_outer_stride, x_inner_stride)", "x_inner, x_outer_stride, C)"),
        (check_rms_norm_backward, "dnormed - normed * mean", "dnormed"),
        (check_rms_norm_backward, "tl.num_programs(0), num", "tl.num_programs(0) + 1, num"),
        (check_layer_norm, ", weight, bias)", ", weight, weight)"),
        (check_layer_norm_backward, "dx -= tl.sum(dnormed", "dx += 0 * tl.sum(dnormed"),
        (check_layer_norm_backward, DBIAS, DBIAS.replace("grad", "dx")),
    ],
    "_rows": [
        (check_layer_norm, CENTRED, "    return x"),
        (check_layer_norm, "x = tl.where(mask, x", "x = tl.where(mask | True, x"),
    ],
    "_add_norm": [
        (check_add_rms_norm, "(residual + x)", "(residual - x)"),
        (check_add_rms_norm, "        x *= tl.load", "        residual *= tl.load"),
        (check_add_rms_norm_backward, "dresidual = passed + dr", "dresidual = dr"),
        (check_add_rms_norm_backward, "dresidual * x)", "passed * x)"),
        (check_add_layer_norm_backward, DBIAS, DBIAS.replace("grad", "passed")),
    ],
    "rotary": [
        (check_rotary, "x1 * cos - x2 * sin", "x1 * cos + x2 * sin"),
        (check_rotary, "x2 * cos + x1 * sin", "x2 * cos + x2 * sin"),
        (check_rotary, "position * HALF + columns", "token * HALF + columns"),
    ],
    "swiglu": [
        (check_swiglu, GATE, GATE.replace(" + F", "")),
        (check_swiglu_backward, "(1 + gate * (1 - sigmoid))", "(gate * (1 - sigmoid))"),
    ],
    "_linear": [
        (check_linear, "bias_ptr + F + features", "bias_ptr + features"),
        (check_linear, "index % (GROUP_M * tiles_n) // group", "index // group"),
    ],
    "linear": [
        (check_linear, "tl.cast(F, tl.int64) * C", "tl.cast(F, tl.int64)"),
    ],
    "linear_int8": [
        (check_linear_int8, "scales_ptr + F + inside", "scales_ptr + inside"),
        (check_linear_int8, "panel_starts(inside + F, S)", "panel_starts(inside, S)"),
    ],
    "linear_int4": [
        (check_linear_int4, "packed >> 4", "packed & 15"),
        (check_linear_int4, "x_ptrs + STEP_BYTES", "x_ptrs"),
        (check_linear_int4, "k * BLOCK_K // GROUP * PANEL_ROWS", "0"),
        (check_linear_int4, "_scale_starts(inside + F", "_scale_starts(inside"),
    ],
    "_panels": [
        (check_linear_int8, "features % PANEL_ROWS * STEP", "features % 16 * STEP"),
        (check_linear_int8, "columns % STEP_BYTES", "0"),
    ],
    "_quantize": [
        (check_rms_norm_quant, "tl.div_rn(largest, LIMIT) * factor", "tl.div_rn(largest, LIMIT)"),
        (check_rms_norm_quant, "(y + TO_NEAREST) - TO_NEAREST", "y"),
    ],
    "rms_norm_quant": [
        (check_rms_norm_quant, "rsqrt(mean + eps)", "rsqrt(mean)"),
    ],
    "_attention_core": [
        (check_attention, "total = total * shrink + tl.sum", "total = total + tl.sum"),
        (check_attention, "2.402264791363012e-1", "2.41e-1"),
        (check_shared_keys, "key_head * GROUP + block % GROUP", "key_head * GROUP"),
        (check_shared_keys, "block // GROUP * repeat_step", "block * 0"),
    ],
    "_attention_masks": [
        (check_attention, UP_TO, UP_TO.replace(" + 1", "")),
        (check_attention, "tl.where(position < prefix, 0, prefix)", "position * 0"),
    ],
    "attention": [
        (check_attention_backward, 'tl.where(empty, float("-inf"), largest)', "largest"),
    ],
    "_attention_backward": [
        (check_attention_backward, "tl.max(tl.where(empty, positions + 1, 0), axis=0)", "high"),
        (check_attention_backward, NOTHING_SEEN, "low"),
        (check_attention_backward, ALIKE, "p"),
        (check_shared_keys_backward, "range(0, M, block)", "range(0, block, block)"),
    ],
    "_attention_combine": [
        (check_split_keys, ".to(tl.float32) * LOG2E)", ".to(tl.float32))"),
        (check_split_keys, "mask=part < parts, other", "mask=part < parts - 1, other"),
    ],
    "decode_attention": [
        (check_decode_attention, "seen = keys < end", "seen = keys <= end"),
    ],
    "qk_norm_attention": [
        (check_qk_norm_attention, "last_key *= tl.load(k_rstd_ptr + N - 1)", "last_key *= 1.0"),
        (check_qk_norm_attention, FACTOR, "scores *= 1.0"),
        (check_qk_norm_attention, ONE, ONE.replace("1.0", "0.0")),
    ],
    "_qk_norm_attention_backward": [
        (check_qk_norm_attention_backward, "(score - lse - lse_low, v", "(score - lse_low, v"),
        (check_qk_norm_attention_backward, "(rstd * unit)[None, :]", "unit"),
        (check_qk_norm_attention_backward, "common * q_weight, mask", "common * k_weight, mask"),
    ],
    "pooling_attention": [
        (check_pooling_attention, "(acc - shift[:, None])", "acc"),
    ],
}  # fmt: skip
CASES = [(file, *mutation) for file, mutations in MUTATIONS.items() for mutation in mutations]


def operator_of(check) -> str:
    name = check.__name__.removeprefix("check_").removesuffix("_backward")
    return "attention" if name in ("shared_keys", "split_keys") else name


@pytest.mark.parametrize("check", dict.fromkeys(check for _, check, _, _ in CASES))
def test_the_original_passes(check, tmp_path):
    operator = operator_of(check)
    with mutant(operator, operator, "", "", tmp_path) as original:
        check(original)


@pytest.mark.parametrize("file, check, old, new", CASES)
def test_the_mutant_is_caught(file, check, old, new, tmp_path):
    with (
        mutant(operator_of(check), file, old, new, tmp_path) as broken,
        pytest.raises(AssertionError, match="error"),
    ):
        check(broken)
