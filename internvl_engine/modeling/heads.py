"""The head of a language model, by what a state dict holds: a weight of its own, or the embedding.

A configuration says whether they are tied, and published ones are often wrong about it: the state
dict decides, as it does for checkpoints (checkpoint/ties.py).
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import ties


def follow_head(model: Any, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before `load_state_dict`: a tied head needs no entry, and one with its own is untied."""
    for each in ties.heads(model):
        head, embedding = prefix + each.head, prefix + each.embedding
        output = each.owner.get_output_embeddings()
        tied = output.weight is each.owner.get_input_embeddings().weight
        if not tied or embedding not in state_dict:
            continue
        if head not in state_dict:
            state_dict[head] = state_dict[embedding]
        elif not torch.equal(state_dict[head], state_dict[embedding]):
            output.weight = nn.Parameter(torch.empty_like(output.weight))
            each.owner.config.tie_word_embeddings = False
