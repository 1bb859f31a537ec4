"""Zero-shot classification: an image goes to the label whose prompts it is most similar to.

    weight(label) = unit(mean over templates of unit(text embedding))
    probability = softmax(100 * image . weights)

The factor is 100, not exp(logit_scale), as in the published ImageNet evaluation.

    B images, K labels, E width of the embeddings
"""

import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from ..embedding import Embedder, Mode, Outcome
from .classifier import Progress, classifier
from .prompts import Template, checked_labels

__all__ = ["Prediction", "Template", "classifier", "classify", "classify_each"]

FACTOR = 100.0


class Prediction(NamedTuple):
    """A label, and its probability among all labels."""

    label: str
    probability: float


def classify(
    engine: Embedder,
    images: Any,
    labels: Iterable[str],
    templates: Template | Iterable[Template] | None = None,
    mode: Mode = "c",
    top_k: int | None = None,
    batch_size: int | None = None,
    cache: str | os.PathLike | bool = True,
    progress: Progress | None = None,
) -> list[list[Prediction]]:
    """The labels of images with their probabilities, the most likely first.

    Args, Raises: as `Tasks.classify`.
    """
    names, weights = _prepared(engine, labels, templates, top_k, cache, progress)
    embeddings = engine.encode_image(images, mode, batch_size=batch_size)
    return _predictions(embeddings, names, weights, top_k)


def classify_each(
    engine: Embedder,
    images: Any,
    labels: Iterable[str],
    templates: Template | Iterable[Template] | None = None,
    mode: Mode = "c",
    top_k: int | None = None,
    batch_size: int | None = None,
    cache: str | os.PathLike | bool = True,
    progress: Progress | None = None,
) -> Iterator[Outcome]:
    """The same one image after another, going on where one cannot be used.

    Args: as `Tasks.classify`.

    Yields:
        For every image, in order, (number, its Predictions or None, error or None).
    """
    names, weights = _prepared(engine, labels, templates, top_k, cache, progress)

    def each() -> Iterator[Outcome]:
        for number, row, error in engine.each_image(images, mode, batch_size=batch_size):
            found = None if row is None else _predictions(row[None], names, weights, top_k)[0]
            yield Outcome(number, found, error)

    return each()


def _prepared(
    engine: Embedder, labels: Any, templates: Any, top_k: int | None, cache: Any, progress: Any
) -> tuple[tuple[str, ...], Tensor]:
    if top_k is not None and top_k < 1:
        raise ValueError(f"classify: top_k must be 1 or more, got {top_k}")
    names = checked_labels(labels)
    return names, classifier(engine, names, templates, cache=cache, progress=progress)


def _predictions(
    embeddings: Tensor, labels: tuple[str, ...], weights: Tensor, top_k: int | None
) -> list[list[Prediction]]:
    probabilities = (FACTOR * embeddings @ weights.t()).softmax(-1).cpu()
    best = probabilities.sort(dim=-1, descending=True, stable=True)
    return [
        [Prediction(labels[i], p) for i, p in zip(row, values, strict=True)]
        for row, values in zip(
            best.indices[:, :top_k].tolist(), best.values[:, :top_k].tolist(), strict=True
        )
    ]
