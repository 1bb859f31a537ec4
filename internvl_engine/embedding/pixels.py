"""Pixel values by looking them up: a byte of a channel has 256 values, whatever the image.

They are those of `processing.images.normalized`, bit for bit, in one pass and in any dtype. Only
NumPy works here: it computes where it is called. PyTorch would start a team of threads in every
thread that decodes, and on a machine that is busy they wait for each other.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..processing import InternVLImageProcessor
from ..processing.images import normalized

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # what NumPy has for any dtype of a size


class PixelTable:
    """The values of every byte in every channel.

    Args:
        processor: whose mean and standard deviation count.
        dtype: of the values, floating point.
    """

    def __init__(self, processor: InternVLImageProcessor, dtype: torch.dtype) -> None:
        ramp = torch.arange(256, dtype=torch.uint8, device="cpu")[None, :, None, None]
        values = normalized(ramp.expand(1, 256, 1, 3), processor.mean, processor.std)
        values = values[0, :, :, 0].to(dtype).contiguous()  # (3, 256)
        self.dtype, self.bits = dtype, BITS[dtype.itemsize]
        self.table = values.view(self.bits).numpy()

    def look_up(self, square: np.ndarray) -> np.ndarray:
        """The bits of the values (3, S, S) of pixels (S, S, 3) uint8."""
        found = np.empty((3, *square.shape[:2]), self.table.dtype)
        for channel, plane in enumerate(found):
            np.take(self.table[channel], square[:, :, channel], out=plane, mode="clip")
        return found

    def batch(self, rows: Sequence[np.ndarray], size: int, pinned: bool) -> Tensor:
        """Values (B, 3, S, S) of the bits of B images, each (3, S, S).

        Args:
            rows: none are a batch of none.
            size: S.
            pinned: in memory that a GPU copies from. PyTorch gives it out again when the copy is
                done.
        """
        shape = (len(rows), 3, size, size)
        pixels = torch.empty(shape, dtype=self.dtype, device="cpu", pin_memory=pinned)
        if rows:
            np.stack(rows, out=pixels.view(self.bits).numpy())
        return pixels
