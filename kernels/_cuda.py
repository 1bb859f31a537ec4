"""What the CUDA C++ launchers of csrc/cuda have in common.

They are backend "cuda": behind Triton until a measurement on a GPU says which is faster where.
Nothing here has been measured yet; `prefer("rms_norm", "cuda")` chooses them.
"""

from functools import cache

import torch
from torch import Tensor

from ._rows import Rows

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/cuda/operators.h has them
MAX_BYTES = 32768  # of a row: 1024 threads hold two 16-byte vectors each


def stream() -> int:
    """The current CUDA stream of the current device, as an address.

    As Triton's launcher asks for it: torch.cuda.current_stream() builds an object at every call.
    """
    return torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())


@cache
def has_fp8(device: torch.device) -> bool:
    """Whether a GPU converts to float8_e4m3fn and multiplies it: NVIDIA's from 8.9 on."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def aligned(*rows: Rows) -> bool:
    """Whether all rows are whole 16-byte loads that start on 16 bytes, and not too long."""
    for x, _, outer, inner in rows:
        size = x.element_size()
        length = x.shape[-1] * size
        starts = x.data_ptr() | outer * size | inner * size | length
        if starts % 16 or length > MAX_BYTES:
            return False
    return True


def aligned_heads(*tensors: Tensor) -> bool:
    """Whether both halves of every head (..., D) are whole 16-byte loads that start on 16 bytes."""
    for x in tensors:
        size = x.element_size()
        strides = 0
        for stride in x.stride()[:-1]:
            strides |= stride * size
        half = x.shape[-1] // 2 * size
        if (x.data_ptr() | strides | half) % 16 or x.stride(-1) != 1:
            return False
    return True
