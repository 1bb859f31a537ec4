"""Zero-shot classification: an image goes to the label whose prompts it is most similar to.

    weight(label) = unit(mean over templates of unit(text embedding))
    probability = softmax(100 * image . weights)

The factor is 100, not exp(logit_scale), as in the published ImageNet evaluation.

    B images, K labels, E width of the embeddings
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..embedding import Embedder, Mode, Outcome, fingerprint

TEMPLATES = ("a photo of a {}.",)
FACTOR = 100.0
FIELD = re.compile(r"\{\w*\}")  # where a template has its label: {}, {0}, {c}, {label}

Template = str | Callable[[str], str]


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
    batch_size: int = 32,
) -> list[list[Prediction]]:
    """The labels of images with their probabilities, the most likely first.

    Args, Raises: as `Tasks.classify`.
    """
    names, weights = _prepared(engine, labels, templates, top_k)
    embeddings = engine.encode_image(images, mode, batch_size=batch_size)
    return _predictions(embeddings, names, weights, top_k)


def classify_each(
    engine: Embedder,
    images: Any,
    labels: Iterable[str],
    templates: Template | Iterable[Template] | None = None,
    mode: Mode = "c",
    top_k: int | None = None,
    batch_size: int = 32,
) -> Iterator[Outcome]:
    """The same one image after another, going on where one cannot be used.

    Args: as `Tasks.classify`.

    Yields:
        For every image, in order, (number, its Predictions or None, error or None).
    """
    names, weights = _prepared(engine, labels, templates, top_k)

    def each() -> Iterator[Outcome]:
        for number, row, error in engine.each_image(images, mode, batch_size=batch_size):
            found = None if row is None else _predictions(row[None], names, weights, top_k)[0]
            yield Outcome(number, found, error)

    return each()


def classifier(
    engine: Embedder,
    labels: Iterable[str],
    templates: Template | Iterable[Template] | None = None,
) -> Tensor:
    """The weights (K, E) of labels.

    The engine remembers them for the weights that its model has now, so that only the first call
    runs the model, and one after training runs it again.
    """
    from ..modeling.internvl import unit

    names, chosen = _labels(labels), _templates(templates)
    forms = tuple(t if isinstance(t, str) else tuple(_fill(t, name) for name in names)
                  for t in chosen)  # fmt: skip
    key = (
        names,
        forms,
        engine.device,
        *fingerprint(engine.model, ["text"], exact=True).items(),
    )
    weights = engine.remembered.get(key)
    if weights is None:
        columns = [f if isinstance(f, tuple) else [_fill(f, name) for name in names] for f in forms]
        prompts = [prompt for row in zip(*columns, strict=True) for prompt in row]
        embeddings = engine.encode_text(prompts).unflatten(0, (len(names), len(chosen)))
        weights = unit(torch.mean(embeddings, dim=1))
        engine.remember(key, weights)
    return weights


def _prepared(
    engine: Embedder, labels: Any, templates: Any, top_k: int | None
) -> tuple[tuple[str, ...], Tensor]:
    if top_k is not None and top_k < 1:
        raise ValueError(f"classify: top_k must be 1 or more, got {top_k}")
    names = _labels(labels)
    return names, classifier(engine, names, templates)


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


def _labels(labels: Any) -> tuple[str, ...]:
    """Labels in their order, of anything that can be gone through."""
    names = _several(labels, "labels")
    if not names:
        raise ValueError("classify: needs at least one label and one template")
    for number, name in enumerate(names):
        if not isinstance(name, str):
            raise ValueError(
                f"classify: label {number} is {name!r:.60}, a {type(name).__name__}, not a string"
            )
    return tuple(map(str, names))  # NumPy's strings too


def _templates(templates: Any) -> list[Template]:
    if templates is None:
        return list(TEMPLATES)
    single = isinstance(templates, str) or callable(templates)
    chosen = [templates] if single else _several(templates, "templates")
    if not chosen:
        raise ValueError("classify: needs at least one label and one template")
    for template in chosen:
        if not callable(template) and not (isinstance(template, str) and FIELD.search(template)):
            raise ValueError(f"classify: template {template!r:.60} has no {{}} for the label")
    return [t if callable(t) else str(t) for t in chosen]


def _several(texts: Any, what: str) -> tuple[Any, ...]:
    try:
        if isinstance(texts, str):
            raise TypeError
        return tuple(texts)
    except TypeError:
        kind = "one string" if isinstance(texts, str) else type(texts).__name__
        raise ValueError(f"classify: {what} are several strings, got {kind}") from None


def _fill(template: Template, label: str) -> str:
    """A prompt: {} is the label's place; without one, every other field is."""
    if callable(template):
        prompt = template(label)
        if not isinstance(prompt, str):
            raise ValueError(
                f"classify: a template made {prompt!r:.60} of {label!r}; it must return a string"
            )
        return prompt
    if "{}" in template:
        return template.replace("{}", label)
    return FIELD.sub(lambda _: label, template)
