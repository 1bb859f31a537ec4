"""Passes over batches of images: to the device while it works, and smaller where memory runs out.

On a GPU everything below returns before the device is done: the next batch is copied from pinned
memory, on a stream of its own, while the present one is computed, and the results of a batch are
looked at when the next one is on its way.
"""

from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing

import torch
from torch import Tensor

from .batch_size import BatchSize, is_out_of_memory
from .batches import ImageBatch


def embed_batches(
    batches: Generator[ImageBatch, None, None],
    embed: Callable[[Tensor], Tensor],
    device: torch.device,
) -> Generator[tuple[ImageBatch, Tensor | None], None, None]:
    """Every batch with embed(its pixels), None for one without pixels; in order.

    Args:
        batches: closed at the end, whichever way that comes.
        embed: may return before its result is there.
        device: where that is. Only on a GPU the next batch begins before a batch is handed out.
    """
    behind: deque[tuple[ImageBatch, Tensor | None]] = deque()
    with closing(batches):
        for batch in batches:
            behind.append((batch, embed(batch.pixels) if len(batch.pixels) else None))
            if device.type != "cuda" or len(behind) > 1:
                yield behind.popleft()
        yield from behind


def within_memory(
    embed: Callable[[Tensor], Tensor], pixels: Tensor, limit: BatchSize, release: Callable[[], None]
) -> Tensor:
    """embed(pixels) in as many pieces as memory asks for, (kinds, B, E).

    Args:
        embed: of any number of images.
        pixels: (B, 3, S, S), of one image or more.
        limit: the most images at a time; halved where that is too much, for those who use it next.
        release: gives back what is kept for speed, before a smaller piece is tried.

    Raises:
        Whatever says that no memory is left, where a single image does not fit.
    """
    found: list[Tensor] = []
    start = 0
    while start < len(pixels):
        piece = pixels[start : start + limit.size]
        try:
            found.append(embed(piece))
            start += len(piece)
            continue
        except Exception as error:
            if not (is_out_of_memory(error) and limit.shrink(len(piece))):
                raise
        release()  # when the error is gone, with the tensors of the frames that it held
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


class Upload:
    """Copies pixels to a device, beside what that computes."""

    def __init__(self) -> None:
        self.streams: dict[torch.device, torch.cuda.Stream] = {}

    def __call__(self, pixels: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """pixels there, and so for whatever the current stream is given from here on."""
        if device.type != "cuda" or pixels.device.type != "cpu":
            return pixels.to(device, dtype)
        stream = self.streams.setdefault(device, torch.cuda.Stream(device))
        with torch.cuda.stream(stream):
            placed = pixels.to(device, dtype, non_blocking=True)
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        placed.record_stream(current)
        return placed
