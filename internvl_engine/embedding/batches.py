"""Batches of images for the vision tower, decoded by threads ahead of the device."""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..processing import InternVLImageProcessor
from ..processing.images import normalized
from .ahead import map_ahead, num_threads
from .batch_size import BatchSize, checked_batch_size
from .pictures import pictures

DECODING_THREADS = num_threads()


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
    batch_size: int | BatchSize,
    dtype: torch.dtype,
    *,
    keep_errors: bool = False,
    pinned: bool = False,
) -> Generator[ImageBatch, None, None]:
    """Pixel values of images that may be endless; the next batch is decoded during the present one.

    Args:
        processor: makes the pixels.
        images: one image, or any iterable of images; it is read in the caller's thread, at most a
            batch further than the batches that were taken. Each image is taken as it is when it is
            read.
        batch_size: of every batch but the last. A BatchSize may shrink between two batches.
        dtype: of the pixels.
        keep_errors: images that cannot be used are left out of the pixels and named in the batch.
        pinned: in memory that a GPU copies from while the CPU goes on.

    Raises:
        ValueError: batch_size is below 1; and without `keep_errors` what the processor raises, with
            the number that the image has in `images`.
    """
    if not isinstance(batch_size, BatchSize):
        batch_size = BatchSize(checked_batch_size(batch_size))
    return _batches(processor, images, batch_size, dtype, keep_errors, pinned)


def pixel_batches(
    pixel_values: Tensor, size: int, limit: BatchSize
) -> Generator[ImageBatch, None, None]:
    """Pixel values that are given, in batches.

    Raises:
        ValueError: they are not (B, 3, size, size) and floating point.
    """
    if pixel_values.shape[1:] != (3, size, size) or not pixel_values.is_floating_point():
        raise ValueError(
            f"encode_image: pixel_values must be normalised values (B, 3, {size}, {size}), got "
            f"{pixel_values.dtype} {tuple(pixel_values.shape)}"
        )
    return _split(pixel_values, limit)


def _split(pixel_values: Tensor, limit: BatchSize) -> Generator[ImageBatch, None, None]:
    start = 0
    while start < len(pixel_values):
        pixels = pixel_values[start : start + limit.size]
        yield ImageBatch(pixels, list(range(start, start + len(pixels))), [])
        start += len(pixels)


def _batches(
    processor: InternVLImageProcessor, images: Any, limit: BatchSize, dtype: torch.dtype,
    keep_errors: bool, pinned: bool,
) -> Generator[ImageBatch, None, None]:  # fmt: skip
    squares = partial(_squares, processor, keep_errors)
    outcomes = map_ahead(squares, pictures(images), lambda: limit.size, DECODING_THREADS)
    assemble = partial(_batch, processor=processor, dtype=dtype, pinned=pinned)
    batch: list[Outcome] = []
    # Batches are put together in a thread of their own, by PyTorch: two teams of threads tell
    # OpenMP that they share the processors, and waiting threads sleep in place of spinning. On a
    # busy machine with two cores the model's passes take a seventh of the time.
    with closing(outcomes), ThreadPoolExecutor(1, thread_name_prefix="images") as thread:
        for outcome in outcomes:
            batch.append(outcome)
            if len(batch) >= limit.size:
                yield thread.submit(assemble, batch).result()
                batch = []
        if batch:
            yield thread.submit(assemble, batch).result()


def _squares(
    processor: InternVLImageProcessor, keep_errors: bool, number: int, image: Any
) -> Outcome:
    """The (1, S, S, 3) uint8 pixels of one image, in a thread.

    Nothing of PyTorch computes here: every thread would start a team of its own.
    """
    try:
        return Outcome(number, processor.squares([image], first=number))
    except (OSError, ValueError, TypeError) as error:
        if not keep_errors:
            raise
        return Outcome(number, error=error)


def _batch(
    outcomes: list[Outcome], processor: InternVLImageProcessor, dtype: torch.dtype, pinned: bool
) -> ImageBatch:
    sound = [outcome for outcome in outcomes if outcome.error is None]
    squares = torch.cat([o.value for o in sound]) if sound else processor.squares([])
    pixels = normalized(squares, processor.mean, processor.std).to(dtype)
    if pinned:  # PyTorch keeps such memory, and gives it out again when its copy is done
        pixels = pixels.pin_memory()
    broken = [outcome for outcome in outcomes if outcome.error is not None]
    return ImageBatch(pixels, [outcome.number for outcome in sound], broken)
