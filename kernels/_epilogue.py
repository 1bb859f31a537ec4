"""What a linear layer does to its finished product: y = residual + epilogue(x @ weight.T + bias).

none         the product
gelu         x * Phi(x), exact, with erf
swiglu       silu(gate) * up of the two halves of the columns
gelu_tanh    x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3))): SigLIP's
gelu_quick   x * sigmoid(1.702 * x): CLIP's
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPILOGUES = ("none", "gelu", "swiglu", "gelu_tanh", "gelu_quick")
QUICK = 1.702


def apply_epilogue(y: Tensor, epilogue: str = "none", residual: Tensor | None = None) -> Tensor:
    """residual + epilogue(y) of a finished product y, for products that do not fuse them.

    Args:
        y: (..., F).
        epilogue: one of EPILOGUES.
        residual: the shape of the result, or None.

    Returns:
        (..., F), or (..., F / 2) with "swiglu".

    Raises:
        ValueError: an unknown epilogue.
    """
    if epilogue not in EPILOGUES:
        raise ValueError(f"apply_epilogue: epilogue must be in {EPILOGUES}, got {epilogue!r}")
    if epilogue == "gelu":
        y = F.gelu(y)
    elif epilogue == "gelu_tanh":
        y = F.gelu(y, approximate="tanh")
    elif epilogue == "gelu_quick":
        y = y * torch.sigmoid(QUICK * y)
    elif epilogue == "swiglu":
        y = torch.ops.internvl.swiglu.default(y)
    # y first, whose order of memory the sum takes: residual may have any.
    return y if residual is None else y + residual


def epilogue_backward(grad: Tensor, y: Tensor, epilogue: str) -> Tensor:
    """The gradient of the finished product y from that of apply_epilogue(y, epilogue)."""
    if epilogue == "gelu":
        return torch.ops.aten.gelu_backward(grad, y)
    if epilogue == "gelu_tanh":
        return torch.ops.aten.gelu_backward(grad, y, approximate="tanh")
    if epilogue == "gelu_quick":  # x * sigmoid(a * x) is silu(a * x) / a
        return torch.ops.aten.silu_backward(grad, QUICK * y)
    return torch.ops.internvl.swiglu_backward.default(grad, y)


def output_shape(x: Tensor, features: int, epilogue: str) -> tuple[int, ...]:
    """The shape of the result for x (..., C): F wide, or F / 2 with SwiGLU."""
    return (*x.shape[:-1], features // 2 if epilogue == "swiglu" else features)
