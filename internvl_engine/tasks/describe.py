"""Captions and embeddings of the same images from one pass over each.

    vision states x                                  one pass
    C = pooler1(x)
    query states, with their keys and values         one pass of the 96 queries
    G = unit(pooler2(query states)) + unit(C)
    captions: the prompts go on from the queries' keys and values

What the queries compute is the same in both uses: they see each other and no text, at positions 0
to 95. So their pass serves the G embedding and every prompt, which then has only its own tokens to
read, and the image is read by cross-attention once.

    B images, Q queries, N vision tokens, E width of the embeddings
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..embedding import Embedder, Outcome
from ..embedding.batches import ImageBatch, checked_batch_size, image_batches
from ..embedding.images import not_finite
from ..processing.text import CAPTION_PROMPT
from .caption import checked_settings, checked_texts
from .caption_queue import CaptionQueue, Prompt, prompt_cache


class Description(NamedTuple):
    """What one pass over an image gives.

    text: its caption, or a list of them for several prompts.
    c, g: its embeddings (E,).
    """

    text: Any
    c: Tensor
    g: Tensor


def describe_each(
    engine: Embedder,
    images: Any,
    prompt: str | Iterable[str] | None = None,
    *,
    keep: bool = True,
    normalize: bool = True,
    stop: Iterable[str] = (),
    batch_size: int = 8,
    **settings: Any,
) -> Iterator[Outcome]:
    """Describes one image after another; checked at once, and run as it is asked for.

    Args:
        engine, images, prompt, stop, batch_size, settings: as `Tasks.describe`.
        keep: name images that cannot be used, and go on; else they raise.
        normalize: embeddings of unit length.

    Yields:
        For every image, in order, (number, its Description or None, error or None).
    """
    for ability in ("C embeddings of images", "G embeddings of images", "captions"):
        engine.require(ability)
    single = prompt is None or isinstance(prompt, str)
    prompts = checked_texts("describe", CAPTION_PROMPT if prompt is None else prompt)
    settings, stop = checked_settings(**settings), checked_texts("describe", stop) if stop else []
    batch_size = checked_batch_size(batch_size)
    batches = image_batches(
        engine.processor.image_processor, images, batch_size, engine.dtype, keep_errors=keep,
        pinned=engine.device.type == "cuda",
    )  # fmt: skip
    queue = DescriptionQueue(engine, batches, lambda number: prompts, stop, settings)
    return _described(queue, batch_size, single, keep, normalize)


def _described(
    queue: "DescriptionQueue", seats: int, single: bool, keep: bool, normalize: bool
) -> Iterator[Outcome]:
    from ..modeling.internvl import unit

    for number, texts, error in queue.outcomes(seats):
        if error is not None:
            yield Outcome(number, error=error)
            continue
        c, g = queue.embeddings.pop(number)
        if not bool(c.isfinite().all() and g.isfinite().all()):
            problem = ValueError(f"image {number}: {not_finite(queue.engine)}")
            if not keep:
                raise problem
            yield Outcome(number, error=problem)
            continue
        text = texts[0] if single else texts
        c, g = (unit(c), unit(g)) if normalize else (c.clone(), g.clone())
        yield Outcome(number, Description(text, c, g))


class DescriptionQueue(CaptionQueue):
    """A CaptionQueue that keeps the embeddings of its images, and what their queries read."""

    def __init__(
        self, engine: Embedder, batches: Iterable[ImageBatch],
        asked: Callable[[int], Sequence[str]], stop: Sequence[str], settings: dict[str, Any],
    ) -> None:  # fmt: skip
        super().__init__(engine, batches, asked, stop, settings)
        self.embeddings: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.inference_mode()
    def _features(self, batch: ImageBatch) -> Sequence[Any]:
        """What the prompts of each image need: its vision states and its queries' keys."""
        engine, model = self.engine, self.engine.model
        pixels = engine.upload(batch.pixels, engine.device, engine.dtype)
        features, keys = model.read_images(pixels)
        c = model.clip_projector(features.backbone_embeds)
        g = model.g_embedding(c, features.query_embeds).float().to(engine.device)
        for row, number in enumerate(batch.numbers):
            self.embeddings[number] = c.float().to(engine.device)[row], g[row]
        states = features.backbone_embeds.split(1)
        return [ImageRead(x, keys.only(row)) for row, x in enumerate(states)]

    def _cache(self, prompts: Sequence[Prompt], ids: Tensor) -> Any:
        """A cache that holds the queries of every prompt's image."""
        cache = prompt_cache(self.engine, ids, self.settings)
        read = [prompt.features.keys for prompt in prompts]
        for layer in read[0].layers:
            keys, values = (
                torch.cat(x) for x in zip(*(r.layers[layer] for r in read), strict=True)
            )
            cache.update(keys, values, layer)
        return cache

    def _states(self, prompts: Sequence[Prompt]) -> Tensor:
        return torch.cat([prompt.features.states for prompt in prompts])


class ImageRead(NamedTuple):
    """Vision states (1, N, C_v) of an image, and the keys and values of its queries."""

    states: Tensor
    keys: Any
