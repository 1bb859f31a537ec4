"""Linear layers whose weight has 8 bits a value.

    y = residual + epilogue(x @ weight.T + bias)      weight = q * scales, see _int8.py

On a CPU that multiplies bytes (AVX512-VNNI, AVX-VNNI) x is rounded to 8 bits too, row by row while
it is packed, to multiples of max |x| / 127. Values above 8 times the mean magnitude of the rest, at
most 64 a row, are left out of that and multiplied in fp32: channels of 1,000 times the usual size
cost no accuracy. Integers are summed exactly. The error of an output is at most half a step of x
times the sum of its weights' magnitudes, and about step / 12**0.5 times their norm; 0.8 % of a
normal product. On other CPUs panels are widened in cache and x stays as it is.

The epilogue sees fp32 and the result is rounded once. A row of x that is not finite gives no finite
output where x is rounded. No bit of a row depends on the other rows or on the number of threads.

x is (M, C), weight (F, C); (C, F) is (3200, 9600), (3200, 3200), (3200, 12800) and (12800, 3200) in
a layer of the vision tower, with M = 257 rows an image, and (4096, 4096), (4096, 22016) and
(11008, 4096) in QLLaMA. 2 * M * C * F operations; below about 12 rows bound by reading the weight,
half of bfloat16's bytes.
"""

import torch
from torch import Tensor

from . import _gemv
from ._epilogue import EPILOGUES, apply_epilogue, output_shape
from ._int8 import PANEL_ROWS, check_int8, dequantize_int8, rows_of_int8
from ._invariance import is_batch_invariant
from ._library import NATIVE_TYPES, address, native, triton_launcher
from ._linear import define_linear
from ._rows import as_rows
from .linear import check_computed_in, check_operands

MAX_COLUMNS = 65536  # of which int32 holds the sum of products: 255 * 127 each


def linear_int8_native(
    x: Tensor, packed: Tensor, scales: Tensor, sums: Tensor, bias: Tensor | None = None,
    epilogue: str = "none", residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Calls csrc/cpu/linear_int8.h."""
    if x.dtype == torch.float16:  # which it does not know
        wide = None if bias is None else bias.float()
        y = linear_int8_native(x.float(), packed, scales, sums, wide, epilogue).to(x.dtype)
        return y if residual is None else residual + y
    features, columns = scales.shape[0], x.shape[-1]
    if x.dtype not in NATIVE_TYPES or columns > MAX_COLUMNS or packed.numel() == 0:
        return NotImplemented
    if epilogue == "swiglu" and features % (2 * PANEL_ROWS):  # a panel has rows of gate and up
        y = linear_int8_native(x, packed, scales, sums, bias)
        return apply_epilogue(y, epilogue, residual)
    if residual is not None and residual.dtype != x.dtype:
        return residual + linear_int8_native(x, packed, scales, sums, bias, epilogue)
    y = x.new_empty(output_shape(x, features, epilogue))
    rows, dtype = y.numel() // max(y.shape[-1], 1), NATIVE_TYPES[x.dtype]
    threads = torch.get_num_threads()
    x_rows, residual_rows = as_rows(x), None if residual is None else as_rows(residual)
    weight = [tensor.contiguous() for tensor in (packed, scales, sums)]
    bias = None if bias is None else bias.contiguous()
    size = native.linear_int8_workspace(dtype, rows, columns, threads)
    workspace = x.new_empty(size, dtype=torch.uint8)
    native.linear_int8(
        dtype, x_rows.pointer(), tuple(map(address, weight)), address(bias),
        (0, 1, 0, 0) if residual_rows is None else residual_rows.pointer(), y.data_ptr(), rows,
        columns, features, EPILOGUES.index(epilogue), workspace.data_ptr(), threads,
    )  # fmt: skip
    return y


def linear_int8_int_mm(
    x: Tensor, packed: Tensor, scales: Tensor, sums: Tensor, bias: Tensor | None = None,
    epilogue: str = "none", residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rows of x in 8 bits, then PyTorch's integer product: cuBLAS's, on a GPU.

    By preference only: a channel of 1,000 times the usual size, as large models have, leaves the
    other values of its row no bits. cuBLAS takes more than 16 rows, and multiples of 8.
    """
    features, channels = scales.shape[0], x.shape[-1]
    if is_batch_invariant() or x.numel() <= 16 * channels or features % 8 or channels % 8:
        return NotImplemented
    q, q_scales = torch.ops.internvl.gelu_quant.default(x, torch.int8, "none")
    product = torch._int_mm(q.view(-1, channels), rows_of_int8(packed, features).t())
    y = product * q_scales.view(-1, 1) * scales
    y = (y if bias is None else y + bias).to(x.dtype)
    return apply_epilogue(y.view(*x.shape[:-1], features), epilogue, residual)


def linear_int8_cuda(
    x: Tensor, packed: Tensor, scales: Tensor, sums: Tensor, bias: Tensor | None = None,
    epilogue: str = "none", residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Calls csrc/cuda/linear.cu, for 1 to 8 rows; x stays as it is."""
    held = _gemv.weight_of((packed, scales, sums), scales.shape[0], x.shape[-1])
    return _gemv.linear_cuda(x, held, bias, epilogue, residual)


_linear_int8 = define_linear(
    "linear_int8",
    "Tensor packed, Tensor scales, Tensor sums",
    features=lambda packed, scales, sums: scales.shape[0],
    dense=lambda packed, scales, sums, columns, dtype: dequantize_int8(
        packed, scales, columns, dtype
    ),
    cpu={"native": linear_int8_native},
    cuda={
        "triton": triton_launcher("linear_int8"),
        "int_mm": linear_int8_int_mm,
        "cuda": linear_int8_cuda,
    },
)


def linear_int8(
    x: Tensor, packed: Tensor, scales: Tensor, sums: Tensor, bias: Tensor | None = None,
    epilogue: str = "none", residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """residual + epilogue(x @ weight.T + bias) with a weight of 8 bits; see `linear`.

    The weight is a constant: x, bias and residual have gradients, it has none.

    Args:
        x: (..., C), float32, bfloat16 or float16, any strides; cast to autocast's dtype under
            autocast.
        packed: int8 (P, S, 32, 4), as `quantize_int8` returns it.
        scales: float32 (F,).
        sums: int32 (F,).
        bias: (F,), the dtype of x, or None.
        epilogue: as in `linear`.
        residual: the shape of the output, added last, or None.

    Returns:
        (..., F), or (..., F / 2) with "swiglu", contiguous, of the dtype to which x and residual
        promote.

    Raises:
        ValueError: shapes or dtypes that do not go together, or an unknown epilogue.
    """
    check_computed_in("linear_int8", x)
    shape = torch.Size((scales.shape[0], x.shape[-1]))
    check_int8("linear_int8", packed, *shape)
    _check_rows(scales, sums)
    check_operands("linear_int8", x, shape, x.dtype, bias, epilogue, residual)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        y = _linear_int8(x, packed, scales, sums, bias, epilogue)
        return y if residual is None else residual + y
    return _linear_int8(x, packed, scales, sums, bias, epilogue, residual)


def _check_rows(scales: Tensor, sums: Tensor) -> None:
    """Raises ValueError where the scales and sums of a weight's rows do not go together."""
    found = (scales.dtype, sums.dtype, sums.shape)
    if found != (torch.float32, torch.int32, scales.shape) or scales.dim() != 1:
        raise ValueError(
            f"linear_int8: needs scales torch.float32 (F,) and sums torch.int32 (F,), got "
            f"{scales.dtype} of shape {tuple(scales.shape)} and {sums.dtype} of shape "
            f"{tuple(sums.shape)}"
        )
