"""q, k and v in one tensor whose rows are grouped by key head, as InternLM2's `attention.wqkv`.

    H query heads, K key heads, g = H / K query heads a key head, d rows a head
    rows (K, g + 2, d): [:, :g] are q, whose head k * g + j is [k, j]; [:, g] is k; [:, g + 1] is v

Source: OpenGVLab/InternVL, modeling_internlm2.py
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

PIECES = ("q", "k", "v")


class Heads(NamedTuple):
    """How many heads queries and keys have."""

    query: int
    key: int

    @property
    def groups(self) -> int:
        """Heads that lie beside each other in a group of the packed tensor."""
        return self.query // self.key + 2

    def rows(self, piece: str, packed: int) -> int:
        """The rows of q, k or v out of those of the packed tensor."""
        head = packed // (self.key * self.groups)
        return head * (self.query if piece == "q" else self.key)

    def fit(self, packed: int) -> bool:
        """Whether a packed tensor can have that many rows."""
        shared = self.key > 0 and self.query % self.key == 0
        return shared and packed % (self.key * self.groups) == 0


def heads_of(values: dict[str, Any]) -> Heads | None:
    """The heads that the configuration of a language model states; None where it states none."""
    query = values.get("num_attention_heads")
    key = values.get("num_key_value_heads") or query
    return Heads(query, key) if isinstance(query, int) and isinstance(key, int) else None


def take(packed: Tensor, piece: str, heads: Heads) -> Tensor:
    """q, k or v (rows, ...) out of the packed tensor; a copy where its rows are apart."""
    groups = packed.view(heads.key, heads.groups, -1, *packed.shape[1:])
    own = {"q": slice(0, -2), "k": slice(-2, -1), "v": slice(-1, None)}[piece]
    return groups[:, own].reshape(heads.rows(piece, packed.shape[0]), *packed.shape[1:])


def pack(q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> Tensor:
    """The packed tensor of q, k and v. Undoes `take`."""
    size = k.shape[0] // heads.key
    parts = [each.reshape(heads.key, -1, size, *each.shape[1:]) for each in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, *k.shape[1:])
