"""Zero-shot classification: an image goes to the label whose prompts it is most similar to.

    weight(label) = unit(mean over templates of unit(text embedding))
    probability = softmax(100 * image . weights)

The factor is 100, not exp(logit_scale), as in the published ImageNet evaluation.

    B images, K labels, E width of the embeddings
"""

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .embedder import Embedder, Mode, unit

TEMPLATES = ("a photo of a {}.",)
FACTOR = 100.0
KEPT = 16  # classifiers that are remembered for each engine

_weights: "WeakKeyDictionary[Embedder, dict[tuple, Tensor]]" = WeakKeyDictionary()


class Prediction(NamedTuple):
    """A label, and its probability among all labels."""

    label: str
    probability: float


def classify(
    engine: Embedder,
    images: Any,
    labels: Sequence[str],
    templates: Sequence[str] | None = None,
    mode: Mode = "c",
    top_k: int | None = None,
    batch_size: int = 32,
) -> list[list[Prediction]]:
    """The labels of images with their probabilities, the most likely first.

    Args:
        engine: with embeddings of images and texts.
        images: as `Embedder.encode_image` takes them.
        labels: K different labels, of which each image is taken to have one.
        templates: prompts with {} in the place of the label; None is `TEMPLATES`.
        mode: "c" or "g".
        top_k: how many labels of each image; None is all.
        batch_size: images at a time.

    Returns:
        One list for each image.

    Raises:
        ValueError: no labels, the same label twice, a template without {}, or what `encode_image`
            refuses.
    """
    weights = classifier(engine, labels, templates)
    embeddings = engine.encode_image(images, mode, batch_size=batch_size)
    probabilities = (FACTOR * embeddings @ weights.t()).softmax(-1).cpu()
    best = probabilities.sort(dim=-1, descending=True, stable=True)
    return [
        [Prediction(labels[i], p) for i, p in zip(row, values, strict=True)][:top_k]
        for row, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def classifier(
    engine: Embedder, labels: Sequence[str], templates: Sequence[str] | None = None
) -> Tensor:
    """The weights (K, E) of labels; remembered, so that only the first call runs the model."""
    templates = TEMPLATES if templates is None else templates
    _check(labels, templates)
    key = (tuple(labels), tuple(templates))
    known = _weights.setdefault(engine, {})
    if key not in known:
        prompts = [template.replace("{}", label) for label in labels for template in templates]
        embeddings = engine.encode_text(prompts).unflatten(0, (len(labels), len(templates)))
        if len(known) >= KEPT:
            known.pop(next(iter(known)))
        known[key] = unit(torch.mean(embeddings, dim=1))
    return known[key]


def _check(labels: Sequence[str], templates: Sequence[str]) -> None:
    if isinstance(labels, str) or isinstance(templates, str):
        raise ValueError("classify: labels and templates are lists of strings, got one string")
    if not labels or not templates:
        raise ValueError("classify: needs at least one label and one template")
    twice = {label for label in labels if labels.count(label) > 1}
    if twice:
        raise ValueError(f"classify: labels must differ, {sorted(twice)[0]!r} comes twice")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"classify: template {template!r} has no {{}} for the label")
