"""Batches for the towers: images streamed and prepared ahead, texts of similar length together."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..processing import InternVLImageProcessor
from ..processing.images import is_one_image
from ..processing.padding import TokenBatch, pad_rows

DECODING_THREADS = min(8, os.cpu_count() or 1)


def image_batches(
    processor: InternVLImageProcessor, images: Any, batch_size: int, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Pixel values of images that may be endless, the next batch prepared during the present one.

    Args:
        processor: makes the pixels.
        images: one image, or any iterable of images; it is read in the caller's thread.
        batch_size: of every batch but the last.
        dtype: of the pixels.

    Yields:
        (up to batch_size, 3, S, S) on the CPU.

    Raises:
        ValueError: batch_size is below 1; and what the processor raises, with the number that the
            image has in `images`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    sources = iter([images] if is_one_image(images) else images)
    prepared: deque[Future[Tensor]] = deque()
    count = 0
    with ThreadPoolExecutor(1, thread_name_prefix="images") as pool:
        while chunk := list(islice(sources, batch_size)):
            options: dict[str, Any] = {"dtype": dtype, "workers": DECODING_THREADS, "first": count}
            prepared.append(pool.submit(processor, chunk, **options))
            count += len(chunk)
            if len(prepared) > 1:
                yield prepared.popleft().result()
        while prepared:
            yield prepared.popleft().result()


def text_batches(rows: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[int]]:
    """Indices of rows of ids that are run together: shortest first, so that padding is small.

    A batch holds as many rows as keep (rows x its longest row) within max_tokens, and at least one.
    """
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index])):
        if batch and (len(batch) + 1) * len(rows[index]) > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padded(rows: Sequence[Sequence[int]]) -> TokenBatch:
    """Rows of ids as one right-padded batch with its mask, (B, L) each."""
    return pad_rows(rows, "right")
