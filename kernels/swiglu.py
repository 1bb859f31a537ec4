"""SwiGLU: the activation of QLLaMA's MLP.

    y = silu(gate) * up        silu(g) = g * sigmoid(g)        gate_up = [gate | up]

In fp32, rounded once; the published LlamaMLP rounds silu(gate) too. Source: LlamaMLP in
OpenGVLab/InternVL, modeling_qllama.py.

The gradient recomputes the sigmoid s from gate: dgate = grad * up * s * (1 + gate * (1 - s)),
dup = grad * gate * s.

gate_up is (..., 2F), F = 11008: the output of one merged projection. Bound by memory: reads 2F and
writes F forward; reads 3F and writes 2F backward.
"""

import torch
from torch import Tensor

from internvl_engine import reference

from ._autograd import gradient
from ._library import NATIVE_TYPES, contiguous, define, native, triton_launcher
from ._rows import as_rows


def swiglu_native(gate_up: Tensor) -> Tensor:
    """Calls csrc/cpu/swiglu.h."""
    dtype = NATIVE_TYPES.get(gate_up.dtype)
    if dtype is None:
        return NotImplemented
    cols = gate_up.shape[-1] // 2
    y = gate_up.new_empty((*gate_up.shape[:-1], cols))
    rows = as_rows(gate_up)
    native.swiglu(
        dtype, rows.pointer(), y.data_ptr(), y.numel() // max(cols, 1), cols,
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def swiglu_backward_native(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Calls csrc/cpu/swiglu.h."""
    dtype = NATIVE_TYPES.get(gate_up.dtype)
    if dtype is None or grad.dtype != gate_up.dtype:
        return NotImplemented
    d, cols = gate_up.new_empty(gate_up.shape), grad.shape[-1]
    grads, rows = as_rows(grad), as_rows(gate_up)
    native.swiglu_backward(
        dtype, grads.pointer(), rows.pointer(), d.data_ptr(), grad.numel() // max(cols, 1), cols,
        torch.get_num_threads(),
    )  # fmt: skip
    return d


def _backward(ctx, grad: Tensor) -> Tensor:
    return _swiglu_backward(grad, *ctx.saved_tensors)


_swiglu = define(
    "swiglu(Tensor gate_up) -> Tensor",
    reference=contiguous(reference.swiglu),
    fake=lambda gate_up: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
    cpu={"native": swiglu_native},
    cuda={"triton": triton_launcher("swiglu")},
    backward=(
        _backward,
        lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    ),
)

_swiglu_backward = define(
    "swiglu_backward(Tensor grad, Tensor gate_up) -> Tensor",
    reference=gradient(reference.swiglu, wanted=(0,)),
    fake=lambda grad, gate_up: gate_up.new_empty(gate_up.shape),
    cpu={"native": swiglu_backward_native},
    cuda={"triton": triton_launcher("swiglu", "swiglu_backward_triton")},
)


def swiglu(gate_up: Tensor) -> Tensor:
    """Multiplies the second half of every row by silu of the first.

    Args:
        gate_up: (..., 2F), [gate | up]; any strides; float32, float16 or bfloat16.

    Returns:
        (..., F), contiguous, the dtype of gate_up.

    Raises:
        ValueError: the last dimension is odd.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"swiglu: the last dimension must be even, got {tuple(gate_up.shape)}")
    return _swiglu(gate_up)
