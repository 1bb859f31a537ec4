"""Linear layers whose weight has 4 bits a value.

    y = residual + epilogue(x @ weight.T + bias)      weight = (n - 8) * scale, see _int4.py

The native kernels round x to 8 bits on the way, each row and group of columns by a scale of its
own (csrc/cpu/int4_rows.h): 0.6 % of noise beside the 9 % of the weight's own rounding. Channels of
1,000 times the usual size are multiplied apart, in fp32. Sums of a group are integers, exact; no
bit of a row depends on the other rows or on the number of threads, and AVX2, AVX-VNNI, AVX-512 and
AVX512-VNNI give the same.

x is (M, C), weight (F, C); (C, F) is (4096, 12288), (4096, 4096), (4096, 22016) and (11008, 4096)
in a layer of QLLaMA. Decoding a few rows is bound by reading the weight, 0.27 of bfloat16's bytes;
from about 8 rows on by 2 * M * C * F operations.
"""

import torch
from torch import Tensor

from . import _gemv
from ._epilogue import EPILOGUES, apply_epilogue, output_shape
from ._int4 import PANEL_ROWS, dequantize_int4, group_of
from ._library import NATIVE_TYPES, address, native, triton_launcher
from ._linear import define_linear
from ._rows import as_rows
from .linear import check_computed_in, check_operands


def linear_int4_native(
    x: Tensor, packed: Tensor, scales: Tensor, features: int, bias: Tensor | None = None,
    epilogue: str = "none", residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Calls csrc/cpu/linear_int4.h."""
    weight = (packed, scales, features)
    if x.dtype == torch.float16:  # which it does not know
        wide = None if bias is None else bias.float()
        y = linear_int4_native(x.float(), *weight, wide, epilogue).to(x.dtype)
        return y if residual is None else residual + y
    if x.dtype not in NATIVE_TYPES:
        return NotImplemented
    if epilogue == "swiglu" and features % (2 * PANEL_ROWS):  # a panel has rows of gate and up
        return apply_epilogue(linear_int4_native(x, *weight, bias), epilogue, residual)
    if residual is not None and residual.dtype != x.dtype:
        return residual + linear_int4_native(x, *weight, bias, epilogue)
    y = x.new_empty(output_shape(x, features, epilogue))
    columns, group = x.shape[-1], group_of(packed, scales, x.shape[-1])
    rows, threads = y.numel() // max(y.shape[-1], 1), torch.get_num_threads()
    x_rows, residual_rows = as_rows(x), None if residual is None else as_rows(residual)
    packed, scales = packed.contiguous(), scales.contiguous()
    bias = None if bias is None else bias.contiguous()
    size = native.linear_int4_workspace(rows, columns, group, threads)
    workspace = x.new_empty(size, dtype=torch.uint8)
    native.linear_int4(
        NATIVE_TYPES[x.dtype], x_rows.pointer(), (address(packed), address(scales), group),
        address(bias), (0, 1, 0, 0) if residual_rows is None else residual_rows.pointer(),
        y.data_ptr(), rows, columns, features, EPILOGUES.index(epilogue), workspace.data_ptr(),
        threads,
    )  # fmt: skip
    return y


def linear_int4_cuda(
    x: Tensor, packed: Tensor, scales: Tensor, features: int, bias: Tensor | None = None,
    epilogue: str = "none", residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Calls csrc/cuda/linear.cu, for 1 to 8 rows; x stays as it is."""
    held = _gemv.weight_of((packed, scales), features, x.shape[-1])
    return _gemv.linear_cuda(x, held, bias, epilogue, residual)


_linear_int4 = define_linear(
    "linear_int4",
    "Tensor packed, Tensor scales, int features",
    features=lambda packed, scales, features: features,
    dense=dequantize_int4,
    cpu={"native": linear_int4_native},
    cuda={"triton": triton_launcher("linear_int4"), "cuda": linear_int4_cuda},
)


def linear_int4(
    x: Tensor, packed: Tensor, scales: Tensor, features: int, bias: Tensor | None = None,
    epilogue: str = "none", residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """residual + epilogue(x @ weight.T + bias) with a weight in 4 bits; see `linear`.

    The weight is a constant: x, bias and residual have gradients, it has none.

    Args:
        x: (..., C), any strides, float32, bfloat16 or float16.
        packed: a weight (F, C) as `quantize_int4` returned it, uint8 (P, S, 32, 4).
        scales: float16 (P, G, 32); their number says the size of the groups.
        features: F.
        bias: (F,), the dtype of x, or None.
        epilogue: as in `linear`.
        residual: the shape of the output, added last, or None.

    Returns:
        (..., F), or (..., F / 2) with "swiglu", contiguous.

    Raises:
        ValueError: shapes or dtypes that do not go together, or an unknown epilogue.
    """
    check_computed_in("linear_int4", x)
    group_of(packed, scales, x.shape[-1])
    if packed.shape[0] != -(-features // PANEL_ROWS):
        raise ValueError(
            f"linear_int4: {features} features take {-(-features // PANEL_ROWS)} panels of "
            f"{PANEL_ROWS} rows, got a weight of {packed.shape[0]}"
        )
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    shape = torch.Size((features, x.shape[-1]))
    check_operands("linear_int4", x, shape, x.dtype, bias, epilogue, residual)
    return _linear_int4(x, packed, scales, features, bias, epilogue, residual)
