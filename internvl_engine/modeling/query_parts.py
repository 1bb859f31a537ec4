"""The queries and QLLaMA out of an InternVL-14B, in memory or stored."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import AbsentModule, Contents, check_takes, hub_options
from ..checkpoint.parts import AbsentParameter
from ..configuration import InternVLConfig
from .internvl import InternVLModel
from .pooling import AttentionPoolingBlock
from .qllama import LlamaModel

POOLER = "clip_projector2."


class QueryDecoder(nn.Module):
    """QLLaMA without embeddings and LM head, under the published names: `qllama.model.*`.

    Args:
        decoder: a LlamaModel, whose layers and last norm are taken over, not copied.
    """

    def __init__(self, decoder: LlamaModel) -> None:
        super().__init__()
        with torch.device("meta"):
            shell = LlamaModel(decoder.config)
        shell.layers, shell.norm = decoder.layers, decoder.norm
        shell.embed_tokens = None  # type: ignore[assignment]
        self.model = shell

    def forward(self, **inputs: Any) -> Any:
        """As `LlamaModel.forward_train`."""
        return self.model.forward_train(**inputs)


@dataclass
class QueryParts:
    """What a bridge has from an InternVL-14B."""

    decoder: LlamaModel
    query_tokens: nn.Parameter
    pooler: AttentionPoolingBlock | None


def query_parts(source: Any, pool: bool, options: dict[str, Any]) -> QueryParts:
    """The parts of a model, itself and not copies, or those of a checkpoint.

    Args:
        source: an InternVLModel, or a directory or hub id.
        pool: the pooler of the queries too.
        options: of `from_pretrained`, for a checkpoint.

    Raises:
        TypeError, ValueError: source is no InternVL-14B, or lacks what is needed.
    """
    if isinstance(source, str | Path):
        return _stored_parts(source, pool, options)
    if options:
        raise TypeError(f"from_internvl: {', '.join(sorted(options))}: only for a checkpoint")
    if not hasattr(source, "qllama") or not hasattr(source, "query_tokens"):
        raise TypeError(
            f"from_internvl: needed an InternVLModel or its checkpoint, got {type(source).__name__}"
        )
    pooler = source.clip_projector2 if pool else None
    for part in (source.query_tokens, source.language_model.model, pooler):
        if isinstance(part, AbsentModule | AbsentParameter):
            raise ValueError(f"from_internvl: {part.explanation}")
    return QueryParts(source.language_model.model, source.query_tokens, pooler)


def _stored_parts(source: str | Path, pool: bool, options: dict[str, Any]) -> QueryParts:
    """The parts from a checkpoint; nothing of the vision tower is read."""
    config = InternVLConfig.from_pretrained(source, **hub_options(options))
    decoder = LlamaModel.from_pretrained(source, **options)

    def needed(name: str) -> bool:
        return name == "query_tokens" or (pool and name.startswith(POOLER))

    found = check_takes(source, InternVLModel, **hub_options(options))
    contents = Contents.read(found, found.weights(needed), needed)
    if "query_tokens" not in contents.tensors:
        raise ValueError(f"from_internvl: {source} has no query_tokens")
    like = {"device": decoder.norm.weight.device, "dtype": decoder.norm.weight.dtype}
    state = {name: entry.read().to(**like) for name, entry in contents.tensors.items()}
    pooler = None
    if pool:
        with torch.device("meta"):
            pooler = AttentionPoolingBlock(
                config.hidden_size, config.attn_pool_num_heads, qkv_bias=True,
                out_dim=config.clip_embed_dim,
            )  # fmt: skip
        weights = {n.removeprefix(POOLER): t for n, t in state.items() if n.startswith(POOLER)}
        pooler.load_state_dict(weights, assign=True)
    return QueryParts(decoder, nn.Parameter(state["query_tokens"]), pooler)
