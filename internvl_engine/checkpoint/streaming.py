"""Weights that stay in their files because the memory has no room for all of them.

A pass through the model uses every layer once, in order, so that the kernel, which forgets what was
used longest ago, would have forgotten each layer when its turn comes again. Instead, as many layers
as fit are left to its cache, those of the language model first, which every token uses; the others
are read ahead by a thread while the layer before them computes, and forgotten at once.

Nothing is copied: the pages are those of the files, and advice about them is all that is given
(madvise, Linux). Weights that were written to since are the process's own, and stay.
"""

import ctypes
import mmap
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

from torch import Tensor, nn

from .placement import blocks, in_stack

# Of <asm-generic/mman-common.h>: Python's mmap does not know the last two.
READ_AHEAD = 3  # MADV_WILLNEED
FORGET = 21  # MADV_PAGEOUT, Linux 5.4: clean pages go, those that were written to stay


class Stream:
    """The layers of a model that are read at every use.

    Args:
        model: its weights on the CPU, mapped from files.
        room: bytes that may stay in memory.
    """

    def __init__(self, model: nn.Module, room: int) -> None:
        order = [(name, block) for name, block in blocks(model)]
        sizes = {name: _size(block) for name, block in order}
        # Outside of the stacks are embeddings, heads and poolers: small, or read in part.
        first = sorted(
            (name for name, _ in order),
            key=lambda name: (in_stack(model, name), "vision" in name),
        )
        kept: set[str] = set()
        for name in first:
            if sizes[name] <= room:
                kept.add(name)
                room -= sizes[name]
        self.streamed = [name for name, _ in order if name not in kept]
        self.nbytes = sum(sizes[name] for name in self.streamed)
        self._reader: ThreadPoolExecutor | None = None
        streamed = [block for name, block in order if name not in kept]
        for place, block in enumerate(streamed):
            hook = _Hook(self, streamed[place + 1] if place + 1 < len(streamed) else None)
            block.register_forward_pre_hook(hook.before)
            block.register_forward_hook(hook.after, always_call=True)

    def read_ahead(self, block: nn.Module) -> None:
        """Begins to read the weights of a block, in a thread: submitting takes milliseconds."""
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, "read_ahead")
        self._reader.submit(advise, list(block.parameters()), READ_AHEAD)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None}


class _Hook:
    """Reads the block after one ahead, and forgets that one after it ran."""

    def __init__(self, stream: Stream, following: nn.Module | None) -> None:
        self.stream, self.following = stream, following

    def before(self, block: nn.Module, args: Any) -> None:
        if self.following is not None:
            self.stream.read_ahead(self.following)

    def after(self, block: nn.Module, args: Any, output: Any) -> None:
        advise(block.parameters(), FORGET)


def advise(tensors: Iterable[Tensor], advice: int) -> bool:
    """Tells the kernel about the pages of tensors; whether it took the advice of all."""
    function = _madvise()
    if function is None:
        return False
    page, taken = mmap.PAGESIZE, True
    for tensor in _memory(tensors):
        start = tensor.data_ptr() // page * page
        end = tensor.data_ptr() + tensor.nbytes
        taken = function(start, end - start, advice) == 0 and taken
    return taken


@cache
def _madvise() -> Any:
    """The function of the C library; None where there is none."""
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def are_mapped(parameters: Iterable[Tensor]) -> bool:
    """Whether most of some weights lie in mapped files, and not in memory of this process."""
    if sys.platform != "linux":
        return False
    ranges = _files()
    starts = [start for start, _ in ranges]
    inside = outside = 0
    for part in _memory(parameters):
        place = bisect_right(starts, part.data_ptr()) - 1
        if place >= 0 and part.data_ptr() < ranges[place][1]:
            inside += part.nbytes
        else:
            outside += part.nbytes
    return inside > outside


def _files() -> list[tuple[int, int]]:
    """The addresses of this process at which files are mapped."""
    found = []
    with open("/proc/self/maps", encoding="utf-8") as lines:
        for line in lines:
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith("/"):
                start, _, end = fields[0].partition("-")
                found.append((int(start, 16), int(end, 16)))
    return found


def _memory(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The plain tensors that hold weights in any form."""
    for tensor in tensors:
        names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else None
        if names is not None:
            yield from _memory(getattr(tensor, name) for name in names)
        elif tensor.numel() and not tensor.is_meta:
            yield tensor


def _size(block: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in block.parameters())
