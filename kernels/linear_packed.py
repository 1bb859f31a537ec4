"""Linear layers whose weight is held in the layout that the CPU's matrix product reads.

    y = residual + epilogue(x @ weight.T + bias)

F.linear strides through a row-major weight, or reorders it, at every call; packing does that once.
The packed tensor is the only copy of the weight that is needed, takes the same bytes (whole panels:
+0.03 % for the 49,954 rows of QLLaMA's vocabulary, 0 for the other weights of the model) and gives
the dense one back bit-equal. Two layouts, `layout_of` says which one a weight gets:

    panels-RxD  of csrc/cpu/linear.h: float32 and bfloat16, which is widened on its way into the
                product where there are no bf16 dot products. An ordinary tensor (F / R, C / D, R,
                D): panels of R rows, cut into steps of D columns. Its shape is the layout, so what
                another instruction set packed is recognised, and rows that fill whole panels are a
                contiguous range of the tensor.
    onednn      bfloat16 where oneDNN is faster (AMX), and float16. An opaque tensor.

x is (M, C), weight (F, C); (C, F) is (3200, 9600), (3200, 3200), (3200, 12800) and (12800, 3200) in
a layer of the vision tower, with M = 257 rows an image, and (4096, 4096), (4096, 22016) and
(11008, 4096) in QLLaMA. 2 * M * C * F operations; below about 12 rows bound by reading the weight.

In panels the order of a row's sums depends neither on the batch nor on the number of threads.
The epilogue sees the fp32 sums; the result is rounded once, where eager rounds up to three times.
Source of the oneDNN calls: what Inductor's freezing uses, torch/_inductor/mkldnn_lowerings.py.
"""

import torch
from torch import Tensor

from ._epilogue import apply_epilogue
from ._invariance import is_batch_invariant
from ._library import serve_too
from ._linear import define_linear
from ._packing import unpack
from ._panels import check_panels, panel_of, panel_product
from .linear import check_operands

ONEDNN_GELU = {"gelu": "none", "gelu_tanh": "tanh"}  # oneDNN's names of its approximations


def _packed_shape(packed: Tensor, features: int) -> torch.Size:
    """(F, C) of a packed weight that is said to have `features` rows."""
    if packed.dim() != 4:  # oneDNN's
        return packed.shape
    panels, steps, rows, depth = packed.shape
    if panels != -(-features // rows):
        raise ValueError(
            f"linear_packed: {features} features take {-(-features // rows)} panels of {rows} "
            f"rows, got a packed weight of {panels}"
        )
    return torch.Size((features, steps * depth))


def linear_packed_native(
    x: Tensor, packed: Tensor, features: int, bias: Tensor | None = None, epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Calls csrc/cpu/linear.h."""
    if packed.layout != torch.strided or packed.dtype != x.dtype or panel_of(x.dtype) is None:
        return NotImplemented
    check_panels(packed)
    return panel_product(x, packed, features, bias, epilogue, residual)


def linear_packed_onednn(
    x: Tensor, packed: Tensor, features: int, bias: Tensor | None = None, epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Calls oneDNN, GELUs that it knows as its post-operation."""
    if packed.layout == torch.strided or is_batch_invariant():  # it sums by the number of rows
        return NotImplemented
    onednn = torch.ops.mkldnn._linear_pointwise
    if epilogue == "none" and residual is not None and residual.dtype == x.dtype:
        return onednn.binary(x, residual, packed, bias, "add")
    if epilogue not in ONEDNN_GELU:
        return apply_epilogue(onednn(x, packed, bias, "none", [], ""), epilogue, residual)
    y = onednn(x, packed, bias, "gelu", [], ONEDNN_GELU[epilogue])
    return y if residual is None else y + residual


_linear_packed = define_linear(
    "linear_packed",
    "Tensor packed, int features",
    features=lambda packed, features: features,
    dense=lambda packed, features, columns, dtype: unpack(packed, features, columns),
    cpu={"native": linear_packed_native, "onednn": linear_packed_onednn},
)

# An opaque oneDNN tensor has a dispatch key of its own, which comes before that of the CPU.
serve_too("linear_packed", "MkldnnCPU")


def linear_packed(
    x: Tensor, packed: Tensor, features: int, bias: Tensor | None = None, epilogue: str = "none",
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """residual + epilogue(x @ weight.T + bias) with a packed weight; see `linear` for the meaning.

    The weight is a constant: x, bias and residual have gradients, it has none.

    Args:
        x: (..., C), any strides, the dtype of the weight. Under autocast it is cast to that dtype,
            and the result to autocast's.
        packed: a weight (F, C) as `pack` returned it.
        features: F.
        bias: (F,), the dtype of the weight, or None.
        epilogue: as in `linear`.
        residual: the shape of the output, added last, or None.

    Returns:
        (..., F), or (..., F / 2) with "swiglu", contiguous.

    Raises:
        ValueError: shapes or dtypes that do not go together, an unknown epilogue, or a weight that
            was packed for another instruction set.
    """
    shape, dtype = _packed_shape(packed, features), packed.dtype
    check_operands("linear_packed", x, shape, dtype, bias, epilogue, residual)
    if torch.is_autocast_enabled("cpu"):
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        y = _linear_packed(x, packed, features, bias, epilogue)
        y = y.to(torch.get_autocast_dtype("cpu"))
        return y if residual is None else y + residual
    return _linear_packed(x, packed, features, bias, epilogue, residual)
