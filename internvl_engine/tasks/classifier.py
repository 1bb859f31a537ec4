"""The weights of a zero-shot classifier, made of prompts as they are needed, and kept.

    weight(label) = unit(mean over templates of unit(text embedding))

21,841 labels under 80 templates are 1.7 million prompts. They are written and tokenized a chunk at
a time and averaged as their embeddings come, so that time grows with their number and memory with
that of the labels. What was made is kept: by the engine, and on disk where making it took long.

    K labels, E width of the embeddings
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import __version__, kernels
from ..embedding import Embedder, fingerprint
from .classifier_files import ClassifierFiles
from .prompts import Template, checked_labels, checked_templates, fill

CHUNK = 4096  # prompts at a time, at least those of one label
SLOW = 1.0  # seconds: what is made faster is not written to disk

Progress = Callable[[int, int], object]


def classifier(
    engine: Embedder,
    labels: Iterable[str],
    templates: Template | Iterable[Template] | None = None,
    *,
    cache: str | os.PathLike | bool = True,
    progress: Progress | None = None,
) -> Tensor:
    """The weights (K, E) of labels, on the engine's device.

    They are remembered, by the engine and on disk, for the weights that its model has now: only the
    first call runs the model, and one after training runs it again.

    Args:
        engine: whose model embeds the prompts.
        labels, templates: as `Tasks.classify`.
        cache: the folder on disk; True is the user's (see `classifier_files`), False none.
        progress: called with (prompts done, prompts in all) while the model runs.
    """
    names, chosen = checked_labels(labels), checked_templates(templates)
    key = _key(engine, names, chosen)
    weights = engine.remembered.get((key, engine.device))
    if weights is None:
        engine.require("embeddings of texts")
        files, shape = ClassifierFiles.at(cache), (len(names), engine.model.config.clip_embed_dim)
        place = _of_every_row(key, engine) if files else ""
        weights = files.read(place, shape) if files else None
        if weights is None:
            start = time.monotonic()
            weights = _made(engine, names, chosen, progress)
            if files and time.monotonic() - start >= SLOW:
                files.write(place, weights)
        weights = weights.to(engine.device)
        engine.remember((key, engine.device), weights)
    return weights


def _made(
    engine: Embedder, names: Sequence[str], templates: Sequence[Template], progress: Progress | None
) -> Tensor:
    """The weights, chunk by chunk: whole labels, so that no order of sums depends on a chunk."""
    from ..modeling.internvl import unit

    count, chunk = len(templates), max(CHUNK // len(templates), 1)
    weights: list[Tensor] = []
    for start in range(0, len(names), chunk):
        some = names[start : start + chunk]
        prompts = [fill(template, name) for name in some for template in templates]
        embeddings = engine.encode_text(prompts).unflatten(0, (len(some), count))
        weights.append(unit(torch.mean(embeddings, dim=1)))
        if progress is not None:
            progress((start + len(some)) * count, len(names) * count)
    return torch.cat(weights)


def _key(engine: Embedder, names: Sequence[str], templates: Sequence[Template]) -> str:
    """A hash of all that the weights depend on.

    The model's weights with their dtype and form, the kind of device that computes with them, the
    tokenizer, labels and templates; of a template that is a function, the prompts that it makes.
    """
    digest = hashlib.sha256()

    def add(*values: Any) -> None:
        for value in values:
            content = value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")
            digest.update(len(content).to_bytes(8, "little") + content)

    weights = fingerprint(engine.model, ["text"], exact=True)
    add(__version__, *weights.items(), engine.device.type, kernels.is_batch_invariant())
    add(engine.processor.tokenizer.model_bytes, len(names), *names)
    for template in templates:
        if isinstance(template, str):
            add("template", template)
        else:
            add("function", *(fill(template, name) for name in names))
    return digest.hexdigest()


def _of_every_row(key: str, engine: Embedder) -> str:
    """A key with every bit of the token embeddings, for what other processes find.

    `fingerprint` reads samples of large tensors, which training always changes; one new row of this
    table (an added token, textual inversion) changes nothing else.
    """
    table = engine.model.get_input_embeddings().weight
    names = table.__tensor_flatten__()[0] if hasattr(table, "__tensor_flatten__") else ()
    digest = hashlib.sha256(key.encode())
    for tensor in [getattr(table, name) for name in names] or [table]:
        held = tensor.detach().cpu().contiguous()
        digest.update(held.view(torch.uint8).numpy().data)
    return digest.hexdigest()
