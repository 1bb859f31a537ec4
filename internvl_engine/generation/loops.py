"""Greedy decoding and sampling: the next token of every row, until all have ended.

Tokens are chosen as transformers' `_sample` chooses them, from the same processors in the same
order and with the same calls of the random generator, so that the ids are the same. The end of a
row is looked at every few steps where a look stops the device (a GPU): what a row went on to write
after its end is padding afterwards, as if it had been looked at in every step.

    B rows, L ids so far, V vocabulary
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from .step import Rows

STEPS_PER_LOOK = 8  # on a device that runs ahead of the host


class Rules(NamedTuple):
    """What transformers made of a generation configuration, and who reads along."""

    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    config: GenerationConfig
    streamer: Any = None

    @property
    def padding(self) -> Tensor | None:
        """The id that follows the end of a row; None where no id ends one."""
        ends = any(hasattr(each, "eos_token_id") for each in self.criteria)
        return self.config._pad_token_tensor if ends else None

    def steps(self, ids: Tensor) -> int:
        """New tokens of every row, at most, behind ids (B, L)."""
        return max(self.config.max_length - ids.shape[1], 1)


def sample(rows: Rows, ids: Tensor, logits: Tensor, rules: Rules) -> Tensor:
    """Continues rows that have read their prompts.

    Args:
        rows: of the batch, ids but the next one in their storage.
        ids: (B, L), what processors and criteria see of the prompts.
        logits: (B, V), of the next token.
        rules: of transformers.

    Returns:
        (B, L + new tokens), padded behind the end of a row where an id ends it.
    """
    ends = Ends(ids, rules)
    looks = steps_per_look(ids, rules)
    left = rules.steps(ids)
    for step in range(1, left + 1):
        chosen = choose(rules.processors(ids, wide(logits, ids)), bool(rules.config.do_sample))
        ids = torch.cat((ids, ends.padded(chosen)[:, None]), dim=1)
        if step == left or step % looks == 0:
            ids = ends.look(ids)
        if rules.streamer is not None:
            rules.streamer.put(ids[:, -1].cpu())
        if ends.all_ended:
            break
        if step < left:
            logits = rows.advance(ids[:, -1])
    if rules.streamer is not None:
        rules.streamer.end()
    return ids


def steps_per_look(ids: Tensor, rules: Rules) -> int:
    """How often the host looks for an end: where it waits for the device anyway, in every step."""
    waits = ids.device.type == "cpu" or rules.streamer is not None
    return 1 if waits else STEPS_PER_LOOK


def wide(logits: Tensor, ids: Tensor) -> Tensor:
    """A copy of the logits in fp32, where processors may write."""
    return logits.to(ids.device, torch.float32, copy=True)


def choose(scores: Tensor, do_sample: bool) -> Tensor:
    """The next id of each row, (B,), of processed scores (B, V)."""
    if do_sample:
        return torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
    return scores.argmax(-1)


class Ends:
    """Which rows have ended, judged for every step in turn but not necessarily at once.

    alive: (B,) bool. lengths: (B,), the ids of each row up to its end.
    """

    def __init__(self, ids: Tensor, rules: Rules) -> None:
        self.criteria, self.padding = rules.criteria, rules.padding
        if self.padding is not None:
            self.padding = self.padding.to(ids.device)
        self.alive = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        self.lengths = torch.full_like(self.alive, ids.shape[1], dtype=torch.int64)
        self.judged = ids.shape[1]
        self.all_ended = False

    def padded(self, chosen: Tensor) -> Tensor:
        """chosen (B,), with padding in rows that are known to have ended."""
        return chosen if self.padding is None else chosen.where(self.alive, self.padding)

    def look(self, ids: Tensor) -> Tensor:
        """ids with padding behind the ends, and without what follows the end of all."""
        alive = []
        for column in range(self.judged, ids.shape[1]):
            if self.padding is not None:
                ids[:, column] = ids[:, column].where(self.alive, self.padding)
            self.lengths = self.lengths + self.alive
            self.alive = self.alive & ~self.criteria(ids[:, : column + 1], None)
            alive.append(self.alive.any())
        goes_on = torch.stack(alive).tolist()
        self.all_ended = not goes_on[-1]
        kept = self.judged + (goes_on.index(False) + 1 if self.all_ended else len(goes_on))
        self.judged = kept
        return ids[:, :kept]
