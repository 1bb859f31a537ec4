"""The integer arithmetic of the launchers, and how large the GPU is.

triton.cdiv and triton.next_power_of_2 are compile-time functions: outside a kernel a call takes 1.6
microseconds, of the 4 that a launch may cost beside Triton's own.
"""

from functools import cache

import torch


def cdiv(total: int, block: int) -> int:
    """How many blocks cover the total."""
    return -(-total // block)


def power_of_2(least: int) -> int:
    """The smallest power of two from `least` on."""
    return 1 << max(least - 1, 0).bit_length()


@cache
def processors(device: torch.device) -> int:
    """How many multiprocessors the GPU has; 8 under the interpreter, so that small tests split."""
    if device.type == "cpu":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def cache_bytes(device: torch.device) -> int:
    """The size of the L2 cache; next to nothing under the interpreter, so that small tests loop."""
    if device.type == "cpu":
        return 1 << 15
    return torch.cuda.get_device_properties(device).L2_cache_size
