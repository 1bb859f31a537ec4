"""Output embeddings that are the input embedding: one tensor in the file, one in the model.

The checkpoint decides. A head in it is a weight of its own, whatever the configuration says; where
there is none, the head takes the weight of the input embedding.
"""

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Head:
    """A language model whose class can tie its head, and the names of the two weights."""

    owner: Any
    head: str
    embedding: str


def heads(model: nn.Module) -> list[Head]:
    """The heads in a model that could be tied.

    QLLaMA's are none: its head is a tensor of its own in every checkpoint.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    found = []
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or not module._tied_weights_keys:
            continue
        head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
        if id(head) in paths and id(embedding) in paths:
            names = (f"{paths[id(layer)]}.weight".lstrip(".") for layer in (head, embedding))
            found.append(Head(module, *names))
    return found


def record(model: nn.Module, tied: Collection[str], path: Path) -> None:
    """Writes into the configurations which heads are tied, for `save_pretrained` to go by.

    Args:
        tied: names of the heads that the checkpoint has no tensor for.
        path: of the checkpoint, for messages.
    """
    for each in heads(model):
        config = each.owner.config
        if each.head in tied and not config.tie_word_embeddings:
            warnings.warn(
                f"{path}: no {each.head}, so {each.embedding} serves as the head too, although the "
                "configuration says tie_word_embeddings=False",
                stacklevel=5,
            )
        config.tie_word_embeddings = each.head in tied
        if hasattr(each.owner, "all_tied_weights_keys"):  # what transformers 5 saves by
            each.owner.all_tied_weights_keys = each.owner.get_expanded_tied_weights_keys()
