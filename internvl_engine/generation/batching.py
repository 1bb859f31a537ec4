"""Many prompts, a few of which are decoded at a time: a row that ends makes room for the next.

The rows of the batch are seats. Prompts that sit down together are a party: they were read in one
pass, have the same number of ids, and transformers made one set of processors and criteria for
them, which sees the ids of the party alone. A step of the model is for all seats, whoever sits
there; an empty one writes where nobody reads.

    R seats, b rows of a party, V vocabulary
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from .decode import Prompts, decode, read_prompts, transformers_loop
from .loops import Ends, Rules, choose, steps_per_look, wide
from .step import Rows, first_slots
from .storage import Storage

Reader = Callable[[int], Any]


class Admitted(NamedTuple):
    """Prompts that were read, with the model and the rules that go on with them."""

    model: Any
    prompts: Prompts
    rules: Rules


def admit(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Any:
    """Reads prompts and decodes nothing: `custom_generate` of a reader of `continue_many`.

    Returns:
        Admitted, or the ids of the whole sequences where the engine does not serve the call.
    """
    rules = Rules(logits_processor, stopping_criteria, generation_config)
    if generation_config.num_beams > 1:
        return decode(model, input_ids, *rules[:3], **model_kwargs)
    prompts = read_prompts(model, input_ids, rules, model_kwargs)
    if prompts is None:
        return transformers_loop(model, input_ids, rules, model_kwargs)
    return Admitted(model, prompts, rules)


def continue_many(read: Reader, seats: int) -> Iterator[tuple[int, Tensor]]:
    """Continues prompts, `seats` at a time.

    Args:
        read: reads the next prompts, up to so many, by a `generate` with `admit`; returns what that
            returned, or None where there are no more.
        seats: R.

    Yields:
        (number of the prompt, counted from 0, its ids with the end), as soon as it ends.
    """
    room = _Room(seats)
    while True:
        while room.free:
            found = read(len(room.free))
            if found is None:
                break
            yield from room.seat(found) if isinstance(found, Admitted) else room.number(found)
        if not room.parties:
            return
        yield from room.step()


class _Party:
    """Rows that sat down together."""

    def __init__(self, admitted: Admitted, seats: Tensor, first: int) -> None:
        self.ids, self.rules = admitted.prompts.ids, admitted.rules
        self.seats, self.first = seats, first
        self.ends = Ends(self.ids, self.rules)
        self.left = self.rules.steps(self.ids)
        self.length = admitted.prompts.cache.get_seq_length()  # the position of the next id
        self.sitting = list(range(len(self.ids)))

    def extend(self, logits: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Appends the next ids, by logits (b, V); the rows that are known to have ended."""
        rules = self.rules
        scores = rules.processors(self.ids, wide(logits, self.ids))
        chosen = self.ends.padded(choose(scores, bool(rules.config.do_sample)))
        self.ids = torch.cat((self.ids, chosen[:, None]), dim=1)
        self.left -= 1
        if self.left and self.left % steps_per_look(self.ids, rules):
            return
        self.ids = self.ends.look(self.ids)
        alive, lengths = self.ends.alive.tolist(), self.ends.lengths.tolist()
        for row in list(self.sitting):
            if not (alive[row] and self.left):
                self.sitting.remove(row)
                yield row, self.ids[row, : lengths[row]]


class _Room:
    """The seats, and the rows of the model that are decoded in them."""

    def __init__(self, seats: int) -> None:
        self.free = list(range(seats))
        self.parties: list[_Party] = []
        self.rows: Any = None  # Rows, from the first party on
        self.next_ids: Any = None  # (R,), what every seat appends at the next step
        self.numbered = 0

    def number(self, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Numbers sequences that are complete already."""
        for row in ids:
            yield self.numbered, row
            self.numbered += 1

    def seat(self, admitted: Admitted) -> Iterator[tuple[int, Tensor]]:
        """Gives every row of a party a seat, its keys and values to that, and the first id."""
        prompts, count = admitted.prompts, len(admitted.prompts.ids)
        keys = prompts.cache.layers[0].keys
        length = keys.shape[2]
        if self.rows is None:
            self._furnish(admitted, keys)
        taken, self.free = self.free[:count], self.free[count:]
        seats = torch.tensor(taken, dtype=torch.int64, device=keys.device)
        self.rows.make_room(length, prompts.most)
        self.rows.storage.load(prompts.cache, prompts.mask, seats)
        held = length if prompts.mask is None else (prompts.mask != 0).sum(1).to(keys.device)
        self.rows.positions[seats], self.rows.moves[seats] = held, 1
        party = _Party(admitted, seats, self.numbered)
        self.numbered += count
        self.parties.append(party)
        yield from self._extend(party, prompts.logits)

    def step(self) -> Iterator[tuple[int, Tensor]]:
        """The next id of every row; yields those that end."""
        self.rows.longest = max(party.length for party in self.parties)
        logits = self.rows.advance(self.next_ids)
        for party in list(self.parties):
            party.length += 1
            yield from self._extend(party, logits[party.seats])

    def _extend(self, party: _Party, logits: Tensor) -> Iterator[tuple[int, Tensor]]:
        for row, ids in party.extend(logits):
            seat = int(party.seats[row])
            self.free.append(seat)
            self.rows.positions[seat] = self.rows.moves[seat] = 0
            yield party.first + row, ids
        if not party.sitting:
            self.parties.remove(party)
        self.next_ids[party.seats] = party.ids[:, -1].to(self.next_ids.device)

    def _furnish(self, admitted: Admitted, keys: Tensor) -> None:
        prompts, seats = admitted.prompts, len(self.free)
        slots = first_slots(keys.shape[2], prompts.most)
        storage = Storage(keys, len(prompts.cache.layers), seats, slots)
        nowhere = torch.zeros(seats, dtype=torch.int64, device=keys.device)
        self.rows = Rows(admitted.model, storage, nowhere, 0, prompts.most)
        self.rows.moves, self.next_ids = nowhere.clone(), nowhere.clone()
