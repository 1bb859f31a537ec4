"""Quantized weights, before `accelerate` and after it, are multiplied as they are."""

import pytest
import torch
from company import (
    KINDS,
    PAIRS,
    close,
    eager,
    put,
    run,
)
from torch import nn
from torch.utils._python_dispatch import return_and_correct_aliasing

from internvl_engine import accelerate

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("kind, state", PAIRS[:-1])  # the published pooler reads its weights
@torch.no_grad()
def test_quantize_dynamic_finds_every_linear(kind, state):
    from torch.ao.quantization import quantize_dynamic

    found = []
    for one in (eager(kind), put(eager(kind), state).eval()):
        quantized = quantize_dynamic(one, {nn.Linear}, torch.qint8)
        count = sum("quantized" in type(m).__module__ for m in quantized.modules())
        found.append((count, run(quantized)))
    assert found[0][0] == found[1][0] > 10
    assert (found[1][1] - found[0][1]).norm() <= 0.05 * found[0][1].norm()


class Scaled(torch.Tensor):
    """A weight in a form of its own, as torchao's are: int8 values and a scale, no storage."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, size, stride):
        return cls(inner["values"], inner["scale"])

    def dense(self):
        return self.values.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            new = cls(args[0].values, args[0].scale)
            return return_and_correct_aliasing(func, args, kwargs or {}, new)
        args = [x.dense() if isinstance(x, cls) else x for x in args]
        return func(*args, **(kwargs or {}))


def quantize(built, wanted=lambda name: True):
    """As torchao's `quantize_`: other weights in the same Linears."""
    for name, module in built.named_modules():
        if isinstance(module, nn.Linear) and wanted(name):
            weight = Scaled.of(module.weight.detach() + 0)
            module.weight = nn.Parameter(weight, requires_grad=False)
    return built


def torchao(built, wanted=lambda name: True):
    ao = pytest.importorskip("torchao.quantization")
    ao.quantize_(
        built,
        ao.Int8WeightOnlyConfig(),
        filter_fn=lambda m, name: isinstance(m, nn.Linear) and wanted(name),
    )
    return built


QUANTIZERS = {"a subclass": quantize, "torchao": torchao}


WEIGHTS = [(kind, torch.float32) for kind in KINDS] + [("chat", torch.bfloat16)]


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("kind, dtype", WEIGHTS)
@torch.no_grad()
def test_quantized_weights_are_multiplied_as_they_are(kind, quantizer, dtype):
    """Before `accelerate` and after it, all Linears and some; nobody reads their address."""
    for wanted in (lambda name: True, lambda name: "k_proj" in name or "fc2" in name):
        expected = QUANTIZERS[quantizer](eager(kind, dtype), wanted)
        weights = [type(m.weight) for m in expected.modules() if isinstance(m, nn.Linear)]
        first = QUANTIZERS[quantizer](eager(kind, dtype), wanted)
        reports = [accelerate(first)]
        second = eager(kind, dtype)
        reports.append(accelerate(second))
        run(second)
        QUANTIZERS[quantizer](second, wanted)
        for one, report in zip((first, second), reports, strict=True):
            close(run(one), run(expected))
            found = [type(m.weight) for m in one.modules() if isinstance(m, nn.Linear)]
            pairs = zip(found, weights, strict=True)
            assert all(t is w or w is nn.Parameter for t, w in pairs)  # or packed
            report.undo()
            close(run(one), run(expected))
            now = [type(m.weight) for m in one.modules() if isinstance(m, nn.Linear)]
            assert now == weights


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_report_says_which_weights_are_in_a_form_of_their_own(quantizer):
    report = accelerate(QUANTIZERS[quantizer](eager("chat")))
    text = str(report)
    name = {"a subclass": "Scaled", "torchao": "Int8Tensor"}[quantizer]
    assert name in text
