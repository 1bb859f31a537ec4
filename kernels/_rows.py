"""Seeing a tensor as rows in memory, without copying the slices that the model makes."""

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """Row r of x starts at (r // inner) * outer_stride + (r % inner) * inner_stride."""

    x: Tensor
    inner: int
    outer_stride: int
    inner_stride: int

    def pointer(self) -> tuple[int, int, int, int]:
        """As csrc/ takes it. The tensor must outlive the call: x may be a copy."""
        return self.x.data_ptr(), self.inner, self.outer_stride, self.inner_stride


def as_rows(x: Tensor) -> Rows:
    """The rows (the last dimension) of x, in order.

    Up to two leading dimensions with any strides, more where they merge: a slice of a packed
    projection and the first 96 positions of every sequence are read in place. Only what has no unit
    stride in the last dimension, or does not merge, is copied.
    """
    if x.is_contiguous():
        cols = x.size(-1)
        return Rows(x, max(x.numel() // cols, 1) if cols else 1, 0, cols)
    if x.stride(-1) != 1:
        return as_rows(x.contiguous())
    if x.dim() == 2:
        return Rows(x, x.shape[0], 0, x.stride(0))
    if x.dim() > 3:
        x = x.flatten(0, -3)  # a view where the strides allow it
    return Rows(x, x.shape[1], x.stride(0), x.stride(1))
