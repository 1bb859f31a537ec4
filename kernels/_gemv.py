"""Linears of 1 to 8 rows in CUDA C++ (csrc/cuda/gemv.cuh), whatever form the weight has.

They are backend "cuda" of `linear`, `linear_int8`, `linear_int4` and of the operators of a decoding
step, behind the others until a measurement on a GPU says where they are faster. A form is read as
the model holds it: row-major, or the panels of _int8.py and _int4.py.

`packed` names what a form consists of: (weight,), (packed, scales, sums) or (packed, scales).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _cuda
from ._epilogue import EPILOGUES, output_shape
from ._int4 import dequantize_int4, group_of
from ._int8 import dequantize_int8
from ._invariance import is_batch_invariant
from ._library import address, native_cuda

MAX_ROWS = 8
WIDE, INT8, INT4 = range(3)  # as csrc/cuda/operators.h numbers the forms
PAIRED_ROWS = 64  # a panel of gate and one of up


class Norm(NamedTuple):
    """The RMSNorm of x that is applied while x is read; see `_decoding.norm_linear`."""

    weight: Tensor
    squares: Tensor | None
    eps: float


class Weight(NamedTuple):
    """A weight (features, columns) in one of the forms."""

    parts: tuple[Tensor, ...]
    features: int
    columns: int

    @property
    def form(self) -> int:
        return {torch.int8: INT8, torch.uint8: INT4}.get(self.parts[0].dtype, WIDE)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The values, rounded once."""
        if self.form == INT8:
            return dequantize_int8(self.parts[0], self.parts[1], self.columns, dtype)
        if self.form == INT4:
            return dequantize_int4(self.parts[0], self.parts[1], self.features, self.columns, dtype)
        return self.parts[0]

    def product(
        self, x: Tensor, bias: Tensor | None = None, epilogue: str = "none",
        residual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """By the operator of the form, which chooses its own backend."""
        operators = torch.ops.internvl
        if self.form == INT8:
            return operators.linear_int8.default(x, *self.parts, bias, epilogue, residual)
        if self.form == INT4:
            options = (self.features, bias, epilogue, residual)
            return operators.linear_int4.default(x, *self.parts, *options)
        return operators.linear.default(x, self.parts[0], bias, epilogue, residual)

    def pointer(self) -> tuple[int, int, int, int, int, int]:
        """As csrc/cuda takes it."""
        scales = 0 if self.form == WIDE else self.parts[1].data_ptr()
        group = group_of(self.parts[0], self.parts[1], self.columns) if self.form == INT4 else 0
        data = self.parts[0].data_ptr()
        return self.form, data, self.features, self.columns, scales, group


def weight_of(parts: Sequence[Tensor | None], features: int, columns: int) -> Weight:
    """A weight from the arguments of an operator, None where a form has fewer."""
    return Weight(tuple(part for part in parts if part is not None), features, columns)


def linear_cuda(
    x: Tensor, weight: Weight, bias: Tensor | None, epilogue: str, residual: Tensor | None,
    norm: Norm | None = None, squares: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Calls csrc/cuda/linear.cu, which writes the sums of squares to `squares` if that is given."""
    rows = input_rows(x, weight, bias)
    if rows is None or (epilogue == "swiglu" and not _pairs(weight, residual)):
        return NotImplemented
    y = x.new_empty(output_shape(x, weight.features, epilogue))
    onto = None if residual is None else residual.reshape(-1, y.shape[-1])
    if onto is not None and (onto.dtype != x.dtype or onto.stride(-1) != 1):
        return NotImplemented
    read = input_pointer(rows, norm)
    native_cuda.linear(
        _cuda.TYPES[x.dtype], read.numbers, read.eps, weight.pointer(), EPILOGUES.index(epilogue),
        address(bias), address(onto), 0 if onto is None else onto.stride(0), y.data_ptr(),
        address(squares), _cuda.stream(),
    )  # fmt: skip
    return y


def _pairs(weight: Weight, residual: Tensor | None) -> bool:
    """Whether a block can have gate and up of the same columns."""
    whole = weight.form == WIDE or weight.features % PAIRED_ROWS == 0
    return whole and residual is None and weight.features % 2 == 0


def input_rows(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor | None:
    """x as (1 to 8, C) for the kernels; None where they do not take it, the weight or the bias."""
    if x.dtype not in (torch.bfloat16, torch.float16) or is_batch_invariant():
        return None
    columns, count = x.shape[-1], x.numel() // max(x.shape[-1], 1)
    if not 0 < count <= MAX_ROWS or columns % 8 or weight.features == 0:
        return None
    if weight.form == WIDE and weight.parts[0].dtype != x.dtype:
        return None
    rows = x.reshape(-1, columns)
    rows = rows if rows.stride(1) == 1 and rows.stride(0) % 8 == 0 else rows.contiguous()
    aligned = not (rows.data_ptr() % 16 or weight.parts[0].data_ptr() % 16)
    lies_well = aligned and all(part.is_contiguous() for part in weight.parts)
    fits = bias is None or (bias.is_contiguous() and bias.dtype == x.dtype)
    return rows if lies_well and fits else None


class Pointers(NamedTuple):
    """x and its norm as csrc/cuda takes them; `kept` must outlive the call."""

    numbers: tuple[int, ...]
    eps: float
    kept: tuple[Tensor, ...]


def input_pointer(rows: Tensor, norm: Norm | None) -> Pointers:
    """Of x (rows, C), with the sums of squares computed where they are not given."""
    start = (rows.data_ptr(), rows.stride(0), *rows.shape)
    if norm is None:
        return Pointers((*start, 0, 0, 0), 0.0, (rows,))
    squares = norm.squares
    if squares is None:
        squares = rows.float().square().sum(-1, keepdim=True)
    squares = squares.reshape(rows.shape[0], -1).float().contiguous()
    weight = norm.weight.contiguous()
    if weight.data_ptr() % 16:
        weight = weight.clone()
    numbers = (*start, squares.data_ptr(), squares.shape[1], weight.data_ptr())
    return Pointers(numbers, norm.eps, (rows, squares, weight))


def check_form(operator: str, x: Tensor, weight: Weight) -> None:
    """Raises ValueError where the parts are no weight (features, C)."""
    first, form = weight.parts[0], weight.form
    if form == WIDE and len(weight.parts) == 1:
        fits = first.shape == (weight.features, weight.columns) and first.dtype == x.dtype
    elif form == INT8 and len(weight.parts) == 3:
        shape = (-(-weight.features // 32), -(-weight.columns // 4), 32, 4)
        fits = first.shape == shape and weight.parts[1].shape == (weight.features,)
    else:
        fits = form == INT4 and len(weight.parts) == 2
        fits = fits and first.shape[0] == -(-weight.features // 32)
        fits = fits and group_of(first, weight.parts[1], weight.columns) > 0
    if not fits:
        raise ValueError(
            f"{operator}: a weight ({weight.features}, {weight.columns}) is (weight,) of {x.dtype},"
            f" (packed, scales, sums) of int8 or (packed, scales) of int4, got "
            f"{[(part.dtype, tuple(part.shape)) for part in weight.parts]}"
        )


def check_norm(
    operator: str, x: Tensor, norm_weight: Tensor | None, squares: Tensor | None
) -> None:
    """Raises ValueError where the norm does not go with x (..., C)."""
    if norm_weight is None:
        fits = squares is None
    else:
        fits = norm_weight.shape == x.shape[-1:] and norm_weight.dtype == x.dtype
        fits = fits and (squares is None or squares.shape[:-1] == x.shape[:-1])
    if not fits:
        found = None if norm_weight is None else (norm_weight.dtype, tuple(norm_weight.shape))
        raise ValueError(
            f"{operator}: norm_weight must be {x.dtype} of shape {tuple(x.shape[-1:])} and squares "
            f"of shape ({', '.join(map(str, x.shape[:-1]))}, P), or both None, got {found} and "
            f"{None if squares is None else tuple(squares.shape)}"
        )
