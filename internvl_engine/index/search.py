"""The nearest embeddings of an index: exact, one matrix product over mapped rows."""

import heapq
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..embedding import Embedder, Mode
from .shards import Shards

ROWS = 65_536  # scored at a time: the pages of rows need not stay in memory


def nearest(shards: Shards, vector: Tensor, k: int) -> list[tuple[str, float]]:
    """Names and scores of the k rows with the largest product with a vector (E,).

    The nearest come first, equal ones in the order of their names.
    """
    best: list[tuple[float, str]] = []  # least first: (-score, name)
    for shard in shards.shards.values():
        for start in range(0, len(shard.paths), ROWS):
            alive = shard.alive[start : start + ROWS]
            count = min(k, int(alive.sum()))
            if not count:
                continue
            scores = (shard.rows[start : start + ROWS] @ vector).masked_fill_(~alive, -torch.inf)
            least = scores.topk(count).values[-1]
            near = (scores >= least).nonzero().flatten()  # all of equal score: the names decide
            names = (shard.paths[start + row] for row in near.tolist())
            found = zip((-scores[near]).tolist(), names, strict=True)
            best = heapq.nsmallest(k, [*best, *found])
    return [(name, -negative) for negative, name in best]


def query_vector(engine: Embedder, query: Any, mode: Mode) -> Tensor:
    """The unit embedding (E,) of a query, on the CPU.

    Args:
        engine: embeds texts and images.
        query: a text; an embedding, (E,) or (1, E), as tensor, array or numbers; or an image.
        mode: in which images are embedded.

    Raises:
        ValueError: it is several, or an embedding of another width or without a direction.
    """
    from ..modeling.internvl import unit

    width = engine.model.config.clip_embed_dim
    given = _numbers(query)
    if given is not None:
        found = unit(given[None])
        if len(given) == width and not found.isfinite().all():
            raise ValueError("search: the query must have finite values, not all of them 0")
    elif isinstance(query, str):
        found = engine.encode_text(query)
    else:
        found = engine.encode_image(query, mode)
    if found.shape != (1, width):
        raise ValueError(
            f"search: the query must be one text, one image or an embedding ({width},), got "
            f"{tuple(found.shape)}"
        )
    return found[0].cpu()


def _numbers(query: Any) -> Tensor | None:
    """An embedding (E,) in any form, as float32 on the CPU; None of texts and images."""
    if isinstance(query, list | tuple) and all(isinstance(v, int | float) for v in query):
        query = np.array(query, dtype=np.float32)
    if isinstance(query, np.ndarray) and query.dtype.kind in "fiu":
        query = torch.from_numpy(np.array(query))
    if not isinstance(query, Tensor):
        return None
    row = query.ndim == 2 and query.shape[0] == 1 and query.is_floating_point()
    return query[0 if row else ...].detach().cpu().float() if row or query.ndim == 1 else None
