"""Beam search, by the rules of transformers' `_beam_search`, in tensors of fixed shape.

Every prompt keeps K running beams and the K best finished ones. A step extends the running ones by
every token and keeps the best of all, twice as many as needed (or more, with more ids that end a
text), since those that end at this step leave. What ends is scored by

    log probability / (new tokens ** length_penalty)

and a prompt is done when no running beam can beat its finished ones, by the estimate that
`early_stopping` chooses. Beams of a prompt share its keys and values, so only what came after it is
reordered.

    N prompts, K beams, M candidates, L ids so far, V vocabulary
"""

from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from .loops import Rules, steps_per_look, wide
from .step import Rows

LOWEST = -1.0e9  # of a beam that does not count
# Which of the drawn candidates are the best K: by their scores, or before 5.24 as they were drawn.
SORTS = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)


class Beams(NamedTuple):
    """Sequences (N, K, longest), their scores (N, K), and how many ids each has got (N, K)."""

    ids: Tensor
    scores: Tensor
    lengths: Tensor

    def gather(self, places: Tensor) -> "Beams":
        """The beams at places (N, any)."""
        wide = places[:, :, None].expand(-1, -1, self.ids.shape[2])
        return Beams(self.ids.gather(1, wide), self.scores.gather(1, places),
                     self.lengths.gather(1, places))  # fmt: skip


def beam_search(rows: Rows, ids: Tensor, logits: Tensor, rules: Rules) -> Tensor:
    """Continues prompts by their best beams.

    Args:
        rows: N * K of them, those of a prompt next to each other and alike.
        ids: (N * K, L), what processors and criteria see of the prompts.
        logits: (N * K, V), of the next token.
        rules: of transformers.

    Returns:
        (N * num_return_sequences, L + new tokens).
    """
    search, prompt = _Search(ids, rules), int(rows.positions.min())
    left = rules.steps(ids)
    looks = steps_per_look(ids, rules)
    for step in range(1, left + 1):
        parents, tokens = search.extend(logits)
        if step == left or step % looks == 0 and not bool(search.goes_on):
            break
        rows.storage.reorder(parents, prompt, rows.longest)
        logits = rows.advance(tokens)
    return search.best(rules.config.num_return_sequences)


class _Search:
    """The running and the finished beams."""

    def __init__(self, ids: Tensor, rules: Rules) -> None:
        self.rules, config = rules, rules.config
        self.beams, self.length, self.prompt = config.num_beams, ids.shape[1], ids.shape[1]
        self.do_sample = bool(config.do_sample)
        self.early: Any = config.early_stopping
        ends = config._eos_token_tensor
        self.candidates = max(2, 1 + (0 if ends is None else len(ends))) * self.beams
        count = len(ids) // self.beams
        running = ids.new_full((count, self.beams, config.max_length), _filler(rules))
        running[:, :, : self.length] = ids.unflatten(0, (count, self.beams))
        scores = torch.full((count, self.beams), LOWEST, dtype=torch.float32, device=ids.device)
        lengths = torch.zeros_like(scores, dtype=torch.int64)
        self.finished = Beams(running.clone(), scores, lengths)
        self.has_ended = torch.zeros_like(scores, dtype=torch.bool)  # (N, K), of the finished ones
        self.improves = torch.ones((count, 1), dtype=torch.bool, device=ids.device)
        first = scores.clone()
        first[:, 0] = 0.0  # they are alike: only the first is extended
        self.running = Beams(running, first, lengths)
        self.offsets = torch.arange(count, dtype=torch.int64, device=ids.device)[:, None]
        self.goes_on = torch.ones((), dtype=torch.bool, device=ids.device)

    def extend(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """A step: logits (N * K, V) to the rows (N * K,) that go on, and their new ids."""
        so_far = self.running.ids[:, :, : self.length].flatten(0, 1)
        scores = self.rules.processors(so_far, wide(logits, so_far).log_softmax(-1))
        places, found = self._candidates(scores)
        ended = self.rules.criteria(found.ids[:, :, : self.length + 1].flatten(0, 1), None)
        ended = ended.view(found.scores.shape)
        going = found._replace(scores=found.scores + ended.float() * LOWEST)
        kept = going.scores.topk(self.beams).indices
        self.running = going.gather(kept)
        self._finish(found, ended)
        self.length += 1
        self._look(ended)
        parents = places.gather(1, kept) + self.offsets * self.beams
        return parents.flatten(), self.running.ids[:, :, self.length - 1].flatten()

    def best(self, count: int) -> Tensor:
        """The finished beams, (N * count, L + new tokens of the longest)."""
        new = int(self.finished.lengths[:, :count].max())
        return self.finished.ids[:, :count].flatten(0, 1)[:, : self.prompt + new]

    def _candidates(self, scores: Tensor) -> tuple[Tensor, Beams]:
        """The best (N, M) extensions: the beams that they extend, and what they are then."""
        vocabulary = scores.shape[1]
        scores = scores.view(-1, self.beams, vocabulary) + self.running.scores[:, :, None]
        scores = scores.flatten(1)
        if self.do_sample:
            places = torch.multinomial(scores.softmax(-1), num_samples=self.candidates)
            values = scores.gather(1, places)
            if SORTS:
                values, order = values.sort(-1, descending=True)
                places = places.gather(1, order)
        else:
            values, places = scores.topk(self.candidates)
        parents = places // vocabulary
        found = self.running.gather(parents)
        found.ids[:, :, self.length] = places % vocabulary
        return parents, Beams(found.ids, values, found.lengths + 1)

    def _finish(self, found: Beams, ended: Tensor) -> None:
        """Takes what ended among the best K candidates to the finished beams, if it is better."""
        ended = ended.clone()
        ended[:, self.beams :] = False
        scores = found.scores / (self.length + 1 - self.prompt) ** self.rules.config.length_penalty
        if self.early is True:
            scores = scores + self.has_ended.all(-1, keepdim=True).float() * LOWEST
        scores = scores + (~self.improves).float() * LOWEST
        scores = scores + (~ended).float() * LOWEST
        # Steps after the last one, which nobody has looked at yet, change nothing.
        scores = scores.where(self.goes_on, -torch.inf)
        old = self.finished
        both = Beams(*(torch.cat(pair, dim=1) for pair in zip(old, found._replace(scores=scores),
                                                             strict=True)))  # fmt: skip
        kept = both.scores.topk(self.beams).indices
        self.finished = both.gather(kept)
        self.has_ended = torch.cat((self.has_ended, ended), dim=1).gather(1, kept)

    def _look(self, ended: Tensor) -> None:
        """Whether any prompt can still improve."""
        config = self.rules.config
        length = self.length - self.prompt
        if self.early == "never" and config.length_penalty > 0.0:
            length = config.max_length - self.prompt
        hoped = self.running.scores[:, :1] / length**config.length_penalty
        worst = self.finished.scores.min(1, keepdim=True).values
        worst = worst.where(self.has_ended, LOWEST)
        self.improves = self.improves & (hoped > worst).any(-1, keepdim=True)
        goes_on = self.improves.any() & ~ended.all()
        if self.early is True:
            goes_on = goes_on & ~self.has_ended.all()
        self.goes_on = self.goes_on & goes_on


def _filler(rules: Rules) -> int:
    """The id that transformers fills sequences with."""
    padding, ends = rules.config._pad_token_tensor, rules.config._eos_token_tensor
    if ends is None:
        return -1
    return int(padding) if padding is not None and int(padding) else int(ends[0])
