import pytest
import torch

from internvl_engine import reference
from internvl_engine.kernels import dequantize_int4, linear_int4, quantize_int4

# Whole panels, part of one, a last group that is part of a step, one row, several panels.
SHAPES = [(96, 64), (33, 42), (5, 7), (1, 320), (200, 130)]


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_rounds_to_half_a_step(shape, group):
    weight = torch.randn(shape)
    packed, scales = quantize_int4(weight, group)
    found = dequantize_int4(packed, scales, *shape, torch.float32)
    rows, columns = shape
    steps = scales.float().abs().transpose(1, 2).flatten(0, 1)[:rows]
    steps = steps.repeat_interleave(group, 1)[:, :columns]
    # The largest of the other sign is clipped: it may lie a whole step from 7.
    assert ((found - weight).abs() <= 1.01 * steps).all()
    assert ((found - weight).abs() <= 0.501 * steps).float().mean() > 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computes_with_the_values_that_it_holds(dtype):
    packed, scales = quantize_int4(torch.randn(33, 130))
    x, bias = torch.randn(3, 130).to(dtype), torch.randn(33).to(dtype)
    weight = dequantize_int4(packed, scales, 33, 130, dtype)
    y = linear_int4(x, packed, scales, 33, bias, "gelu")
    torch.testing.assert_close(y, reference.linear(x, weight, bias, "gelu"), rtol=0.02, atol=0.1)
