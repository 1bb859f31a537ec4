"""Rows of ids on their way to embeddings: each different one once, common beginnings once.

Texts are causal, so padding is left out where it can be, and rows that begin alike need their
common beginning only once. What is common is looked for among the ids, not among the strings:
"summarize:" may be one piece with what follows its colon.

    summarize:a photo of a | cat.         all prompts of one template: 8 ids in common
    summarize:a drawing of the | dog.     and those of another: a group each
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..processing.padding import pad_rows

if TYPE_CHECKING:
    from ..modeling.internvl import InternVLModel

Row = Sequence[int]
WORTH = 128  # ids that must be saved for a pass over prefixes, which reads every weight once more
FULL = 1024  # ids that fill a machine: a batch that has them is not padded to longer rows
PREFIX_TOKENS = 512  # at a time: 32 layers of keys and values hold 0.5 MB for each in bfloat16


class Group(NamedTuple):
    """Rows with the same first `length` ids, by their indices; none in common is length 0."""

    rows: list[int]
    length: int = 0

    @property
    def saved(self) -> int:
        """Ids that are not run again."""
        return self.length * (len(self.rows) - 1)


def embed_rows(
    model: "InternVLModel",
    rows: Sequence[Row],
    max_tokens: int,
    device: torch.device,
    shares: bool = True,
) -> Tensor:
    """Embeddings of rows of ids, (T, E) float32 on the device; not normalised.

    Args:
        model: whose `encode_text` runs.
        rows: ids of whole texts.
        max_tokens: of a batch, with padding.
        device: where ids go.
        shares: run what rows begin with only once, where that is worth it.
    """
    width = model.config.clip_embed_dim
    found = torch.empty(len(rows), width, dtype=torch.float32, device=device)
    for portion in portions(share(rows) if shares else whole(rows)):
        number = {row: n for n, group in enumerate(portion) for row in group.rows}
        start = {row: group.length for group in portion for row in group.rows}
        indices, prefixes = list(number), None
        if portion[0].length:
            first = [rows[group.rows[0]][: group.length] for group in portion]
            prefixes = model.encode_prefixes(*_placed(first, device))
        for batch in text_batches([rows[i][start[i] :] for i in indices], max_tokens):
            places = [indices[index] for index in batch]
            ids, mask = _placed([rows[i][start[i] :] for i in places], device)
            options: dict[str, Any] = {}
            if prefixes is not None:
                options["before"] = prefixes.before(_numbers([number[i] for i in places], device))
            embeddings = model.encode_text(ids, attention_mask=mask, **options)
            found[_numbers(places, device)] = embeddings.float().to(device)
    return found


def _placed(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor]:
    batch = pad_rows(rows, "right")
    return batch.input_ids.to(device), batch.attention_mask.to(device)


def _numbers(numbers: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def whole(rows: Sequence[Row]) -> list[Group]:
    """Rows that share nothing."""
    return [Group(list(range(len(rows))))] if rows else []


def share(rows: Sequence[Row]) -> list[Group]:
    """Groups of rows that begin alike, so that few ids are left; every row is in one.

    The last id of a row is never shared, so that each has a state of its own. Rows that share
    nothing are one group of length 0.
    """
    order = sorted(range(len(rows)), key=lambda index: tuple(rows[index]))
    groups = _alike([rows[index] for index in order])
    if sum(group.saved for group in groups) < WORTH:
        return whole(rows)
    groups = [Group([order[i] for i in group.rows], group.length) for group in groups]
    alone = set(range(len(rows))).difference(*(group.rows for group in groups))
    return groups + ([Group(sorted(alone))] if alone else [])


def _in_common(one: Row, other: Row) -> int:
    most = min(len(one), len(other)) - 1
    return next((i for i in range(most) if one[i] != other[i]), max(most, 0))


def _alike(rows: Sequence[Row]) -> list[Group]:
    """Groups of sorted rows that have ids in common.

    Rows with a common beginning are neighbours, and ranges of such rows lie in one another as a
    tree. Going up it, a group stays as it is or joins the range around it, whichever saves more.
    """
    common = [_in_common(one, other) for one, other in zip(rows, rows[1:], strict=False)]
    ranges = [_Range(0)]
    for index, length in enumerate([*common, 0]):
        if ranges[-1].length < length:
            ranges.append(_Range(length))
        ranges[-1].loose.append(index)
        while ranges[-1].length > length:
            inner = ranges.pop()
            inner.close()
            if ranges[-1].length < length:
                ranges.append(_Range(length))
            ranges[-1].loose += inner.loose
            ranges[-1].groups += inner.groups
    return ranges[0].groups


class _Range:
    """Neighbours with `length` ids in common: those in groups, and those in none so far."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.loose: list[int] = []
        self.groups: list[Group] = []

    def close(self) -> None:
        """Makes a group of the loose rows, with the groups that save more in it than apart."""
        apart = [g for g in self.groups if g.saved > self.length * len(g.rows)]
        joins = [g for g in self.groups if g.saved <= self.length * len(g.rows)]
        group = Group([*self.loose, *(i for g in joins for i in g.rows)], self.length)
        if len(group.rows) > 1 and group.saved >= sum(g.saved for g in joins):
            self.loose, self.groups = [], [*apart, group]


def portions(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Groups whose prefixes are kept at a time, PREFIX_TOKENS at most; those without stay alone."""
    portion: list[Group] = []
    for group in groups:
        longest = max([group.length, *(g.length for g in portion)])
        if portion and (not group.length or longest * (len(portion) + 1) > PREFIX_TOKENS):
            yield portion
            portion = []
        portion.append(group)
    if portion:
        yield portion


def text_batches(rows: Sequence[Row], max_tokens: int) -> Iterator[list[int]]:
    """Indices of rows of ids that are run together: shortest first, so that padding is small.

    A batch holds as many rows as keep (rows x its longest row) within max_tokens, and at least one;
    one that is FULL goes without longer rows.
    """
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index])):
        longer = bool(batch) and len(rows[index]) > len(rows[batch[-1]])
        full = longer and len(batch) * len(rows[batch[-1]]) >= FULL
        if batch and (full or (len(batch) + 1) * len(rows[index]) > max_tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
