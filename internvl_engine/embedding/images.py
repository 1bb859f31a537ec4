"""Images to embeddings: batches through the model, with what is wrong named by its number.

B images, E width of the embeddings
"""

from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .batch_size import batch_size_of
from .batches import ImageBatch, Outcome, image_batches, pixel_batches
from .passes import embed_batches, within_memory

if TYPE_CHECKING:
    from .embedder import Embedder


class ImageEmbeddings(NamedTuple):
    """C and G embeddings of the same B images, (B, E) each."""

    c: Tensor
    g: Tensor


def encode_image(
    engine: "Embedder",
    images: Any,
    pixel_values: Tensor | None,
    mode: str,
    batch_size: int | None,
    normalize: bool,
    progress: Callable[[int], object] | None,
) -> Any:
    """All images at once; see `Embedder.encode_image`."""
    from ..modeling.internvl import unit

    shape = 2 if mode == "both" else 1, 0, engine.model.config.clip_embed_dim
    found = [torch.empty(shape, dtype=torch.float32, device=engine.device)]
    with closing(_passes(engine, images, pixel_values, batch_size, mode)) as passes:
        for batch, rows in passes:
            finite = rows.isfinite().all(-1).all(0)
            if not bool(finite.all()):
                number = batch.numbers[int(finite.logical_not().nonzero()[0])]
                raise ValueError(f"encode_image: image {number}: {not_finite(engine)}")
            found.append(unit(rows) if normalize else rows)
            if progress is not None:
                progress(len(batch.numbers))
    embeddings = torch.cat(found, dim=1)  # ordinary tensors again, out of inference mode
    return ImageEmbeddings(*embeddings) if mode == "both" else embeddings[0]


def each_image(
    engine: "Embedder", images: Any, mode: str, batch_size: int | None, normalize: bool
) -> Generator[Outcome, None, None]:
    """One image after another; see `Embedder.each_image`."""
    from ..modeling.internvl import unit

    with closing(_passes(engine, images, None, batch_size, mode, keep_errors=True)) as passes:
        for batch, rows in passes:
            outcomes = list(batch.broken)
            if rows is not None:
                finite = rows.isfinite().all(-1).all(0).tolist()
                rows = (unit(rows) if normalize else rows).clone()
                for number, row, sound in zip(batch.numbers, rows.unbind(1), finite, strict=True):
                    value = ImageEmbeddings(*row) if mode == "both" else row[0]
                    error = None if sound else ValueError(f"image {number}: {not_finite(engine)}")
                    outcomes.append(Outcome(number, value if sound else None, error))
            yield from sorted(outcomes, key=lambda outcome: outcome.number)


def _passes(
    engine: "Embedder", images: Any, pixel_values: Tensor | None, batch_size: int | None,
    mode: str, keep_errors: bool = False,
) -> Generator[tuple[ImageBatch, Any], None, None]:  # fmt: skip
    """Batches of images, or of pixel values that are given, with their embeddings."""
    processor, device = engine.processor.image_processor, engine.device
    limit = batch_size_of(batch_size, engine.model, device, processor.size)
    if (images is None) == (pixel_values is None):
        raise ValueError("encode_image: give either images or pixel_values")
    if isinstance(images, Tensor) and images.ndim == 4 and images.is_floating_point():
        raise ValueError("encode_image: pass values that are normalised as pixel_values=")
    if pixel_values is None:
        batches = image_batches(
            processor, images, limit, engine.dtype, keep_errors=keep_errors,
            pinned=device.type == "cuda",
        )  # fmt: skip
    else:
        batches = pixel_batches(pixel_values, processor.size, limit)

    def embed(pixels: Tensor) -> Tensor:
        return within_memory(partial(engine.embed_pixels, mode=mode), pixels, limit, engine.release)

    return embed_batches(batches, embed, device)


def not_finite(engine: "Embedder") -> str:
    """What is wrong with an embedding that holds NaN or infinity."""
    narrow = "; float16 overflows, bfloat16 does not" if engine.dtype == torch.float16 else ""
    return f"the embedding that {engine.name} gives is not finite (NaN or infinity){narrow}"
