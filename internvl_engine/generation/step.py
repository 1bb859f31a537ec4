"""One step of decoding as a function of tensors, and the rows of a batch that take it.

    step: ids (B, 1), positions (B,) -> logits (B, V), the keys and values written to the storage

No value is read on the host, so the step is captured into a CUDA graph for every batch and number
of slots; on the CPU the same function is recorded and replayed (capture.py). A capture lives as
long as the rows do, that is within one call, during which nobody changes the weights.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ..capture import Captured, CaptureError
from ..modeling.masks import AttentionMask, mask_of_lengths
from ..modeling.qllama import LlamaForCausalLM
from .storage import BLOCK, StaticCache, Storage
from .support import is_capturable

CACHES = ("past_key_values", "cache")  # of transformers up to 5.23, and from 5.24 on
Step = Callable[[Tensor, Tensor], Tensor]


def step_of(model: Any, storage: Tensor) -> Step:
    """The step of a language model on a storage (layers, 2, B, H, S, D).

    Args:
        model: QLLaMA with its head, eager or fused, or what `unsupported_model` lets pass.
        storage: fixed; what it holds behind a row's position is not read.

    Returns:
        A function of ids (B, 1) int64 and positions (B,) int64, the slots that they are written to,
        with logits (B, V) in the dtype of the model.
    """
    slots = storage.shape[4]
    name = cache_argument(model)

    def step(ids: Tensor, positions: Tensor) -> Tensor:
        cache = StaticCache(storage, positions)
        mask: Any
        if isinstance(model, LlamaForCausalLM):
            mask = AttentionMask("causal", 1, slots, lengths=cache.lengths)
        else:
            mask = mask_of_lengths(cache.lengths, slots, model.dtype)
        outputs = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions[:, None],
            use_cache=True,
            return_dict=True,
            **{name: cache},
        )
        return outputs.logits[:, -1]

    return step


def cache_argument(model: Any) -> str:
    """What the forward of a model calls its cache."""
    known = signature(type(model).forward).parameters
    return next((name for name in reversed(CACHES) if name in known), CACHES[0])


class Rows:
    """The rows of a batch: their keys and values, and where each of them is.

    Args:
        model: a language model.
        storage: of B rows, some slots of which are filled.
        positions: (B,) int64, of the next token of each row.
        longest: the greatest of them, which the host knows.
        most: slots that a row may come to need.
        captures: whether the step may be captured.
    """

    def __init__(
        self, model: Any, storage: Storage, positions: Tensor, longest: int, most: int,
        captures: bool = True,
    ) -> None:  # fmt: skip
        self.model, self.storage, self.positions = model, storage, positions
        self.longest, self.most = longest, most
        self.moves = torch.ones_like(positions)  # 0 in a row that nobody decodes
        self.replay = captures and is_capturable(model)
        self._capture()

    def advance(self, ids: Tensor) -> Tensor:
        """The next logits (B, V) after ids (B,), which every row appends."""
        self.make_room(self.longest + 1, self.most)
        logits = self._run(ids[:, None].to(self.positions.device), self.positions)
        self.positions = self.positions + self.moves
        self.longest += 1
        return logits

    def make_room(self, length: int, most: int) -> None:
        """Sees to slots for so many positions; `most` that a row may come to need."""
        self.most = max(self.most, most, length)
        if length > self.storage.slots:
            self.storage.grow(min(self.most, grown(length)))
            self._capture()

    def _capture(self) -> None:
        step = step_of(self.model, self.storage.tensor)
        self.captured = Captured(step, replay=True) if self.replay else None
        self.step = step

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        if self.captured is not None:
            try:
                return self.captured(ids, positions)
            except CaptureError:  # a module of somebody else's in it reads on the host
                self.replay, self.captured = False, None
        return self.step(ids, positions)


def first_slots(longest: int, most: int) -> int:
    """Slots to begin with, for rows of up to `longest` tokens that may grow to `most`."""
    return max(min(most, -(-(longest + BLOCK) // BLOCK) * BLOCK), longest, 1)


def grown(slots: int) -> int:
    """The next number of slots: by a quarter, in whole blocks."""
    return -(-(slots + max(BLOCK, slots // 4)) // BLOCK) * BLOCK


def start(model: Any, cache: Any, mask: Tensor | None, most: int, captures: bool = True) -> Rows:
    """The rows of a cache that has read the prompts.

    Args:
        cache: of T positions, as transformers filled it.
        mask: (B, T), 0 where a prompt is padded; None where nothing is.
        most: slots that a row may come to need.
        captures: whether the step may be captured.
    """
    keys = cache.layers[0].keys
    batch, _, length, _ = keys.shape
    device = keys.device
    if getattr(cache, "disposable", False) and cache.storage.shape[2] == batch:
        storage = Storage.out_of(cache)
        if mask is not None:
            storage.pack(mask)
    else:
        storage = Storage(keys, len(cache.layers), batch, first_slots(length, most))
        storage.load(cache, mask)
    if mask is None:
        positions = torch.full((batch,), length, dtype=torch.int64, device=device)
    else:
        positions = (mask != 0).sum(1).to(device)
    return Rows(model, storage, positions, length, most, captures)
