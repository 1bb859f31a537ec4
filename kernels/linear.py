"""The linear layer: a matrix product with the activation and the residual add in its epilogue.

    y = residual + epilogue(x @ weight.T + bias)      epilogue: one of _epilogue.py

Products accumulate in fp32. Where the epilogue is fused it sees that accumulator and the result is
rounded once; eager rounds after the product, after the activation and after the add. cuBLASLt's own
GELU epilogue is the tanh form, which is another function.
Source: the tile order and the persistent loop follow Triton's tutorial 09, persistent matmul.

x is (M, C), weight (F, C) as nn.Linear holds it; (C, F) is (3200, 9600), (3200, 3200),
(3200, 12800) with GELU and (12800, 3200) in a layer of the vision tower; (4096, 4096),
(4096, 22016) with SwiGLU and (11008, 4096) in QLLaMA. Bound by operations, 2 * M * C * F, from
about 300 rows on a GPU.

Training keeps the product before the activation, as eager does: one (M, F) tensor, which saves the
backward a third product. The gradients are plain matrix products, which cuBLAS and oneDNN do best.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_engine import reference

from . import _gemv
from ._epilogue import EPILOGUES, apply_epilogue, output_shape
from ._invariance import is_batch_invariant
from ._library import contiguous, define, triton_launcher
from ._linear import inputs_needing_gradient, linear_backward_blas
from ._panels import panel_of, panel_product, to_panels

COMPUTED_IN = (torch.float32, torch.bfloat16, torch.float16)


def linear_blas(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Calls PyTorch's product (cuBLAS, hipBLASLt, oneDNN), then the activation, then the add."""
    if is_batch_invariant():  # it chooses its tiles by the number of rows
        return NotImplemented
    return apply_epilogue(F.linear(x, weight, bias), epilogue, residual)


def linear_cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Calls csrc/cuda/linear.cu, for 1 to 8 rows."""
    held = _gemv.weight_of((weight,), *weight.shape)
    return _gemv.linear_cuda(x, held, bias, epilogue, residual)


def linear_invariant(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """On the CPU, no bit of a row depends on the others: in panels, packed for this call, or alone.

    PyTorch's product of one row is the slower one, for dtypes that the native kernels do not know.
    """
    panel = panel_of(x.dtype)
    if x.numel() == 0 or weight.numel() == 0:
        return reference.linear(x, weight, bias, epilogue, residual)
    if panel is not None and x.dtype == weight.dtype:
        padding = (0, -x.shape[-1] % panel.depth)  # whole steps: zeros add nothing
        packed = to_panels(F.pad(weight, padding), panel)
        return panel_product(F.pad(x, padding), packed, weight.shape[0], bias, epilogue, residual)
    # Each in memory of its own, since a BLAS may sum by the alignment of what it reads.
    rows = (row.clone() for row in x.reshape(-1, x.shape[-1]).split(1))
    y = torch.cat([reference.linear(row, weight, bias, epilogue) for row in rows])
    y = y.view(output_shape(x, weight.shape[0], epilogue))
    return y if residual is None else y + residual


def _linear_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(output_shape(x, weight.shape[0], epilogue), dtype=dtype)


def _linear_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shapes = (x.shape, weight.shape, weight.shape[:1])
    dx, dweight, dbias = (
        x.new_empty(shape if needed else 0) for shape, needed in zip(shapes, wanted, strict=True)
    )
    return dx, dweight, dbias


def _save(ctx, inputs, output) -> None:
    x, weight, bias, ctx.epilogue, residual = inputs
    ctx.save_for_backward(x, weight, bias)
    ctx.residual_dtype = None if residual is None else residual.dtype


def _backward(ctx, grad: Tensor):
    x, weight, bias = ctx.saved_tensors
    needs = inputs_needing_gradient(ctx, 5)
    wanted = needs[:3]
    gradients = _linear_backward(grad, x, weight, bias, ctx.epilogue, wanted)
    dx, dweight, dbias = (
        gradient if needed else None for gradient, needed in zip(gradients, wanted, strict=True)
    )
    dresidual = grad.to(ctx.residual_dtype) if needs[4] else None
    return (dx, dweight, dbias, None, dresidual)[: len(ctx.needs_input_grad)]


_linear = define(
    "linear(Tensor x, Tensor weight, Tensor? bias=None, str epilogue='none', "
    "Tensor? residual=None) -> Tensor",
    reference=contiguous(reference.linear),
    fake=_linear_fake,
    cpu={"blas": linear_blas, "invariant": linear_invariant},
    # cuBLAS until a measurement on a GPU says otherwise: none was made yet.
    cuda={"cublas": linear_blas, "triton": triton_launcher("linear"), "cuda": linear_cuda},
    backward=(_backward, _save),
    lower_in_autocast=True,
)

_linear_backward = define(
    "linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, str epilogue, "
    "bool[3] wanted) -> (Tensor, Tensor, Tensor)",
    reference=linear_backward_blas,
    fake=_linear_backward_fake,
)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """residual + epilogue(x @ weight.T + bias).

    Args:
        x: (..., C), any strides.
        weight: (F, C), the dtype of x, but under autocast, which casts both.
        bias: (F,), or None.
        epilogue: "none", "gelu" (exact, with erf), "gelu_tanh", "gelu_quick" (y * sigmoid(1.702 *
            y)) or "swiglu": weight rows are [gate; up] and the result is silu(gate) * up.
        residual: the shape of the result, added last, or None.

    Returns:
        (..., F), or (..., F / 2) with "swiglu", of the dtype to which x and residual promote.

    Raises:
        ValueError: shapes or dtypes that do not go together, or an unknown epilogue.
    """
    check_operands("linear", x, weight.shape, weight.dtype, bias, epilogue, residual)
    needs_gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)
    )
    if epilogue != "none" and needs_gradient:  # keeps the product for the activation's gradient
        return apply_epilogue(_linear(x, weight, bias), epilogue, residual)
    return _linear(x, weight, bias, epilogue, residual)


def check_computed_in(operator: str, x: Tensor) -> None:
    """Raises ValueError where x is no row, or not of a dtype that quantized weights compute in."""
    if x.dim() == 0 or x.dtype not in COMPUTED_IN:
        raise ValueError(
            f"{operator}: x must be (..., C) in float32, bfloat16 or float16, got {x.dtype} of "
            f"shape {tuple(x.shape)}"
        )


def check_operands(
    operator: str, x: Tensor, shape: torch.Size, dtype: torch.dtype, bias: Tensor | None,
    epilogue: str, residual: Tensor | None,
) -> None:  # fmt: skip
    """Raises ValueError where x, bias and residual do not go with a weight of this shape."""
    features, channels = shape
    autocast = torch.is_autocast_enabled(x.device.type)
    if x.shape[-1:] != shape[1:] or (x.dtype != dtype and not autocast):
        raise ValueError(
            f"{operator}: x must be {dtype} of shape (..., {channels}) for a weight of shape "
            f"{tuple(shape)}, got {x.dtype} of shape {tuple(x.shape)}"
        )
    if bias is not None and (bias.shape != shape[:1] or (bias.dtype != dtype and not autocast)):
        raise ValueError(
            f"{operator}: bias must be {dtype} of shape ({features},), got {bias.dtype} of shape "
            f"{tuple(bias.shape)}"
        )
    if epilogue not in EPILOGUES or (epilogue == "swiglu" and features % 2):
        raise ValueError(
            f"{operator}: epilogue must be in {EPILOGUES}, swiglu for an even number of features; "
            f"got {epilogue!r} for {features} features"
        )
    if residual is not None and residual.shape != output_shape(x, features, epilogue):
        raise ValueError(
            f"{operator}: residual must have the shape of the output, "
            f"{output_shape(x, features, epilogue)}, got {tuple(residual.shape)}"
        )
