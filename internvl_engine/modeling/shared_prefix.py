"""Texts that begin alike: what they have in common is decoded once.

QLLaMA is causal, so the keys and values of the first P positions are those of every text that
begins with the same P ids. One pass over the beginnings keeps them, and the texts go on from there,
each at the positions that its ids have in the whole: the states are those of whole texts, up to the
rounding of sums over another number of rows.

    G prefixes, P tokens of the longest; B texts, S tokens of the longest rest; H heads of D
"""

from typing import Any

import torch
from torch import Tensor

from .masks import AttentionMask


def read_prefixes(decoder: Any, ids: Tensor, attention_mask: Tensor) -> "Prefixes":
    """The keys and values of prefixes.

    Args:
        decoder: a LlamaModel.
        ids: (G, P), with BOS, padded on the right. attention_mask: (G, P), 1 for tokens.
    """
    prefixes, length = Prefixes(attention_mask), ids.shape[1]
    mask = AttentionMask("causal", length, length, padding=prefixes.mask)
    decoder(input_ids=ids, attention_mask=mask, past_key_values=prefixes, use_cache=True)
    return prefixes


def text_states(
    decoder: Any, ids: Tensor, attention_mask: Tensor, before: "Continued | None", **asked: Any
) -> Any:
    """A plain causal pass over texts, or over the rest of texts; the decoder's output.

    Args:
        decoder: a LlamaModel.
        ids, attention_mask: (B, S).
        before: what the texts go on from; None for whole texts.
        asked: output_attentions, output_hidden_states.
    """
    length = ids.shape[1]
    if before is None:
        mask = AttentionMask("causal", length, length, padding=attention_mask)
        return decoder.forward_train(input_ids=ids, attention_mask=mask, **asked)
    return decoder(
        input_ids=ids,
        attention_mask=before.mask_of(attention_mask),
        position_ids=before.positions(length, ids.device),
        past_key_values=before,
        use_cache=True,
        **asked,
    )


class Prefixes:
    """Keys and values of G prefixes, (G, H, P, D) of every layer; a pass of the decoder fills it,
    as it would a cache.

    Args:
        mask: (G, P), true for tokens; padding is on the right.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask.bool()
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions before the prefixes

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keeps the (G, H, P, D) states of a layer."""
        self.layers[layer_idx] = key_states, value_states
        return key_states, value_states

    def only(self, number: int) -> "Prefixes":
        """One of them, a view."""
        one = Prefixes(self.mask[number : number + 1])
        rows = slice(number, number + 1)
        one.layers = {n: (k[rows], v[rows]) for n, (k, v) in self.layers.items()}
        return one

    def before(self, numbers: Tensor) -> "Continued":
        """What B texts go on from: text b from prefix numbers[b]."""
        return Continued(self, numbers)


class Continued:
    """Prefixes as the cache of B texts that go on from them; it keeps nothing of the texts.

    Args:
        prefixes: of which there are G.
        numbers: (B,) int64, the prefix of every text.
    """

    def __init__(self, prefixes: Prefixes, numbers: Tensor) -> None:
        self.prefixes, self.numbers = prefixes, numbers
        self.prefix_mask = prefixes.mask[numbers.to(prefixes.mask.device)]  # (B, P)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.prefixes.mask.shape[1]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """(B, H, S, D) states behind those of the prefixes: (B, H, P + S, D)."""
        keys, values = self.prefixes.layers[layer_idx]
        return self._behind(keys, key_states), self._behind(values, value_states)

    def _behind(self, shared: Tensor, own: Tensor) -> Tensor:
        if shared.shape[0] == 1:
            before = shared.expand(own.shape[0], -1, -1, -1)
        else:
            before = shared.index_select(0, self.numbers.to(shared.device))
        return torch.cat((before.to(own.dtype), own), dim=2)

    def mask_of(self, attention_mask: Tensor) -> AttentionMask:
        """The mask of the rest of the texts, whose own mask is (B, S)."""
        before = self.prefix_mask.to(attention_mask.device)
        padding = torch.cat((before, attention_mask.bool()), dim=1)
        return AttentionMask("causal", attention_mask.shape[1], padding.shape[1], padding=padding)

    def positions(self, length: int, device: torch.device) -> Tensor:
        """(B, S): where the rest of every text stands in the whole, for S = length."""
        own = torch.arange(length, dtype=torch.int64, device=device)
        return self.prefix_mask.sum(1).to(device)[:, None] + own
