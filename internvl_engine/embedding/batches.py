"""Batches of images for the vision tower, streamed and prepared ahead."""

import operator
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..processing import InternVLImageProcessor
from .pictures import pictures

DECODING_THREADS = min(8, os.cpu_count() or 1)
LARGEST = 2**31 - 1  # a batch of everything


class Outcome(NamedTuple):
    """What became of one of many images: the value that was asked for, or the error.

    number: of the image in what was given, from 0.
    """

    number: int
    value: Any = None
    error: Exception | None = None


class ImageBatch(NamedTuple):
    """Pixel values (B, 3, S, S) on the CPU, and what else there is to say about their images.

    numbers: of the B images in what was given.
    broken: the images between them that could not be used; none where those raise.
    """

    pixels: Tensor
    numbers: list[int]
    broken: list[Outcome]


def image_batches(
    processor: InternVLImageProcessor,
    images: Any,
    batch_size: int,
    dtype: torch.dtype,
    *,
    keep_errors: bool = False,
) -> Iterator[ImageBatch]:
    """Pixel values of images that may be endless, the next batch prepared during the present one.

    Args:
        processor: makes the pixels.
        images: one image, or any iterable of images; it is read in the caller's thread. Each is
            taken as it is when it is read.
        batch_size: of every batch but the last.
        dtype: of the pixels.
        keep_errors: images that cannot be used are left out of the pixels and named in the batch.

    Raises:
        ValueError: batch_size is below 1; and without `keep_errors` what the processor raises, with
            the number that the image has in `images`.
    """
    batch_size = checked_batch_size(batch_size)
    sources = pictures(images)
    prepare = _sound_batch if keep_errors else _batch
    prepared: deque[Future[ImageBatch]] = deque()
    count = 0
    with ThreadPoolExecutor(1, thread_name_prefix="images") as pool:
        while chunk := list(islice(sources, batch_size)):
            prepared.append(pool.submit(prepare, processor, chunk, count, dtype))
            count += len(chunk)
            if len(prepared) > 1:
                yield prepared.popleft().result()
        while prepared:
            yield prepared.popleft().result()


def checked_batch_size(batch_size: Any) -> int:
    """A batch size as a number; raises ValueError where it is none of 1 or more."""
    if batch_size is None:
        return 32
    try:
        size = operator.index(batch_size)
    except TypeError:
        size = 0
    if size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size!r}")
    return min(size, LARGEST)


def _batch(
    processor: InternVLImageProcessor, chunk: Sequence[Any], first: int, dtype: torch.dtype
) -> ImageBatch:
    pixels = processor(chunk, dtype=dtype, workers=DECODING_THREADS, first=first)
    return ImageBatch(pixels, list(range(first, first + len(chunk))), [])


def _sound_batch(
    processor: InternVLImageProcessor, chunk: Sequence[Any], first: int, dtype: torch.dtype
) -> ImageBatch:
    """The same without the images that cannot be used."""
    try:
        return _batch(processor, chunk, first, dtype)
    except (OSError, ValueError, TypeError):  # one of them at least: each by itself
        pass
    pixels: list[Tensor] = []
    numbers: list[int] = []
    broken: list[Outcome] = []
    for number, source in enumerate(chunk, first):
        try:
            pixels.append(processor([source], dtype=dtype, first=number))
            numbers.append(number)
        except (OSError, ValueError, TypeError) as error:
            broken.append(Outcome(number, error=error))
    return ImageBatch(torch.cat(pixels) if pixels else processor([], dtype=dtype), numbers, broken)
