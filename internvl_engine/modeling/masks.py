"""Which position of QLLaMA sees which: the modes of the model as additive masks.

A mask travels through the model as an `AttentionMask`, a description; the eager layers ask it for
the additive tensor, fused ones read the description. Either accepts a ready tensor in its place.

    B batch, S query positions (the last S of T), T key positions, Q learned queries, L text length
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import reference


def _make_causal_mask(
    input_ids_shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    past_key_values_length: int = 0,
) -> Tensor:
    """The additive causal mask (B, 1, S, past + S) of a batch of shape (B, S)."""
    batch, queries = input_ids_shape
    keys = past_key_values_length + queries
    seen = reference.attention_mask("causal", queries, keys, 0, None, device)
    return reference.additive_mask(seen, dtype).expand(batch, 1, queries, keys)


def _expand_mask(mask: Tensor, dtype: torch.dtype, tgt_len: int | None = None) -> Tensor:
    """The additive padding mask (B, 1, tgt_len or T, T) of a 0/1 mask (B, T)."""
    batch, keys = mask.shape
    seen = mask.bool()[:, None, None, :].expand(batch, 1, tgt_len or keys, keys)
    return reference.additive_mask(seen, dtype)


@dataclass(eq=False)
class AttentionMask:
    """One of the masks of `reference.attention_mask`, with padding.

    Args:
        kind: "full", "causal", "prefix" or "block".
        queries: S, the positions that look.
        keys: T, the positions looked at; the queries are the last S of them.
        prefix: Q, for "prefix" and "block".
        padding: (B, T), 0 or False where a position is padding; None where there is none.
        lengths: (B,), for one query a row: row b sees the first lengths[b] keys, of which its own
            is the last; None is all of them.
    """

    kind: str
    queries: int
    keys: int
    prefix: int = 0
    padding: Tensor | None = None
    lengths: Tensor | None = None
    _tensors: dict = field(default_factory=dict, repr=False)

    @property
    def is_open(self) -> bool:
        """Whether everybody sees everything, so that no mask is needed."""
        last_row_sees_all = self.queries == 1 and self.kind != "block"
        plain = self.padding is None and self.lengths is None
        return plain and (self.kind == "full" or last_row_sees_all)

    @property
    def key_padding_mask(self) -> Tensor | None:
        """padding as the operators take it: (B, T) bool, True where a key is a token; or None."""
        if self.padding is None or self.padding.dtype == torch.bool:
            return self.padding
        if "key_padding_mask" not in self._tensors:
            self._tensors["key_padding_mask"] = self.padding.bool()
        return self._tensors["key_padding_mask"]

    def additive(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """The mask as published: padding and structure *summed*, then the prefix opened.

        Returns (B or 1, 1, S, T) of 0, the lowest finite value of dtype, or -inf where both hide;
        or None where nothing is hidden. Layers add it to the scores and clamp.
        """
        if self.is_open:
            return None
        if (dtype, device) not in self._tensors and self.lengths is not None:
            self._tensors[dtype, device] = mask_of_lengths(self.lengths, self.keys, dtype)
        if (dtype, device) not in self._tensors:
            seen = reference.attention_mask(
                self.kind, self.queries, self.keys, self.prefix, None, device
            )
            mask = reference.additive_mask(seen, dtype)
            if self.padding is not None:
                padding = _expand_mask(self.padding.to(device), dtype, self.queries)
                mask = mask + padding
                if self.kind in ("prefix", "block"):
                    self._set_prefix(mask)
            self._tensors[dtype, device] = mask
        return self._tensors[dtype, device]

    def _set_prefix(self, mask: Tensor) -> None:
        rows = max(self.prefix - (self.keys - self.queries), 0)
        mask[:, :, :rows, : self.prefix] = 0
        if self.kind == "block":
            mask[:, :, :rows, self.prefix :] = torch.finfo(mask.dtype).min
            mask[:, :, rows:, : self.prefix] = torch.finfo(mask.dtype).min


def mask_of_lengths(lengths: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    """The additive mask (B, 1, 1, T) of one query a row that sees its first lengths[b] keys."""
    seen = torch.arange(keys, dtype=torch.int64, device=lengths.device) < lengths[:, None]
    return reference.additive_mask(seen[:, None, None], dtype)


def count_positions(mask: Tensor) -> Tensor:
    """Positions that count real tokens from 0, and 1 where a row is padded: (B, T) to (B, T)."""
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 1)


def stage2_mask(
    padding: Tensor, prefix: int, dtype: torch.dtype, generation: bool = True
) -> Tensor:
    """The mask of the training pass over three copies of [queries | text].

    The thirds of the batch are matching (everybody sees everything but padding), contrast (queries
    and text apart) and captioning (text sees the queries); without `generation` two thirds are
    matching (negatives, then positives).

    Args:
        padding: (3 * B, L) 0/1 mask of the text.
        prefix: Q.

    Returns:
        (3 * B, 1, Q + L, Q + L), additive.
    """
    third = padding.shape[0] // 3
    ones = padding.new_ones(padding.shape[0], prefix)
    padding = torch.cat((ones, padding), dim=1)
    size = padding.shape[1]
    kinds = ("full", "block", "prefix") if generation else ("full", "full", "block")
    parts = [
        AttentionMask(kind, size, size, prefix, padding[i * third : (i + 1) * third])
        for i, kind in enumerate(kinds)
    ]
    masks = [part.additive(dtype, padding.device) for part in parts]
    return torch.cat([mask for mask in masks if mask is not None])
