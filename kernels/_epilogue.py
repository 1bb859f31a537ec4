"""What a linear layer does to its finished product: y = residual + epilogue(x @ weight.T + bias).

none     the product
gelu     x * Phi(x), exact, with erf
swiglu   silu(gate) * up of the two halves of the columns
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPILOGUES = ("none", "gelu", "swiglu")


def apply_epilogue(y: Tensor, epilogue: str = "none", residual: Tensor | None = None) -> Tensor:
    """residual + epilogue(y) of a finished product y, for products that do not fuse them.

    Args:
        y: (..., F).
        epilogue: "none", "gelu" or "swiglu".
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
    elif epilogue == "swiglu":
        y = torch.ops.internvl.swiglu.default(y)
    return y if residual is None else residual + y


def epilogue_backward(grad: Tensor, y: Tensor, epilogue: str) -> Tensor:
    """The gradient of the finished product y from that of apply_epilogue(y, epilogue)."""
    if epilogue == "gelu":
        return torch.ops.aten.gelu_backward(grad, y)
    return torch.ops.internvl.swiglu_backward.default(grad, y)


def output_shape(x: Tensor, features: int, epilogue: str) -> tuple[int, ...]:
    """The shape of the result for x (..., C): F wide, or F / 2 with SwiGLU."""
    return (*x.shape[:-1], features // 2 if epilogue == "swiglu" else features)
