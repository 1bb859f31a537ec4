"""Kernels broken on purpose, one small mistake each: the checks of this suite must see every one.

A mutant is a copy of a Triton file with one line changed, run interpreted. It is caught where the
comparison that the tests use fails; a mutant that passes would mean that the tests prove nothing.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("mutants run interpreted", allow_module_level=True)

from internvl_engine import reference
from internvl_engine.kernels import _autograd

from numerics import assert_as_accurate_as_eager

KERNELS = Path(__file__).parents[2] / "kernels" / "triton"
EPS = 1e-2  # large enough to matter at values of 1


def mutant(stem: str, old: str, new: str, folder: Path):
    """The module triton/<stem>.py with `old` replaced."""
    source = (KERNELS / f"{stem}.py").read_text()
    assert old in source, f"{stem}.py no longer contains {old!r}"
    file = folder / f"{stem}_mutant.py"
    file.write_text(source.replace(old, new))
    name = f"internvl_engine.kernels.triton.{file.stem}"  # so that its relative imports resolve
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


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


MASK = "(rows < num_rows) & (cols < C)\n    start"
GATE = "start + F + cols, mask=mask, other=0.0).to(tl.float32)\n    y"
ROUNDED = "(x * rstd).to(x_ptr.dtype.element_ty).to(tl.float32)"
# The check, what is replaced in the file of its operator, by what.
MUTATIONS = [
    (check_rms_norm, "/ C + eps)\n    normed", "/ C)\n    normed"),
    (check_rms_norm, MASK, MASK.replace("< C", "< C - 1")),
    (check_rms_norm, MASK, MASK.replace("num_rows", "num_rows - 1")),
    (check_rms_norm, ROUNDED, "(x * rstd).to(tl.float32) + 0.001"),
    (check_rms_norm, "x_inner, x_outer_stride, x_inner_stride)", "x_inner, x_outer_stride, C)"),
    (check_rms_norm_backward, "dnormed - normed * mean", "dnormed"),
    (check_rms_norm_backward, "tl.num_programs(0)):", "tl.num_programs(0) + 1):"),
    (check_add_rms_norm, "(residual + x)", "(residual - x)"),
    (check_add_rms_norm, "        x *= tl.load", "        residual *= tl.load"),
    (check_add_rms_norm_backward, "dresidual = passed + rstd", "dresidual = rstd"),
    (check_add_rms_norm_backward, "dresidual * x)", "passed * x)"),
    (check_rotary, "x1 * cos - x2 * sin", "x1 * cos + x2 * sin"),
    (check_rotary, "x2 * cos + x1 * sin", "x2 * cos + x2 * sin"),
    (check_rotary, "position * HALF + columns", "token * HALF + columns"),
    (check_swiglu, GATE, GATE.replace(" + F", "")),
    (check_swiglu_backward, "(1 + gate * (1 - sigmoid))", "(gate * (1 - sigmoid))"),
]


def stem_of(check) -> str:
    return check.__name__.removeprefix("check_").removesuffix("_backward")


@pytest.mark.parametrize("check", dict.fromkeys(check for check, _, _ in MUTATIONS))
def test_the_original_passes(check, tmp_path):
    check(mutant(stem_of(check), "@triton.jit", "@triton.jit", tmp_path))


@pytest.mark.parametrize("check, old, new", MUTATIONS)
def test_the_mutant_is_caught(check, old, new, tmp_path):
    broken = mutant(stem_of(check), old, new, tmp_path)
    with pytest.raises(AssertionError, match="error"):
        check(broken)
