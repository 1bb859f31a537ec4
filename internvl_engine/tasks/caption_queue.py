"""Prompts about images, read as rows become free, and their texts in the order of the images."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..embedding import Embedder, Outcome
from ..embedding.batches import ImageBatch
from ..generation import KVCache, admit, continue_many
from ..generation.step import first_slots
from ..generation.support import goes_elsewhere
from .streaming import StopAtText, cut


@dataclass
class Entry:
    """An image whose texts are being made: None in the place of each that is not there yet."""

    number: int
    texts: list[str | None]


class Prompt(NamedTuple):
    """One text of one image: what it needs of the image (its vision features (1, N, C_v)), and
    where its continuation goes."""

    features: Any
    text: str
    entry: Entry
    place: int


class CaptionQueue:
    """Continues the prompts of every image.

    Args:
        engine: with parts for captions.
        batches: of images, opened as they are needed.
        asked: the prompts of an image by its number.
        stop: texts before which a continuation ends.
        settings: for `generate`.
    """

    def __init__(
        self, engine: Embedder, batches: Iterable[ImageBatch],
        asked: Callable[[int], Sequence[str]], stop: Sequence[str], settings: dict[str, Any],
    ) -> None:  # fmt: skip
        self.engine, self.asked, self.stop, self.settings = engine, asked, stop, settings
        self.batches = iter(batches)
        self.order: deque[Entry | Outcome] = deque()
        self.waiting: deque[Prompt] = deque()
        self.read: dict[int, Prompt] = {}  # those that go on, as the generator numbers them
        self.numbered = 0

    def outcomes(self, seats: int) -> Iterator[Outcome]:
        """The texts of each image, in order, as soon as they and all before them are there.

        Args:
            seats: prompts that are decoded at a time.
        """
        found = continue_many(self._read, seats)
        while True:
            with torch.inference_mode():
                ended = next(found, None)
            if ended is not None:
                self._take(*ended)
            while self.order and _is_complete(self.order[0]):
                first = self.order.popleft()
                yield first if isinstance(first, Outcome) else Outcome(first.number, first.texts)
            if ended is None:
                return

    def _read(self, count: int) -> Any:
        """Reads the next prompts, up to so many, as `continue_many` asks for them."""
        while not self.waiting:
            batch = next(self.batches, None)
            if batch is None:
                return None
            self._open(batch)
        prompts = [self.waiting.popleft() for _ in range(min(count, len(self.waiting)))]
        self.read |= enumerate(prompts, self.numbered)
        self.numbered += len(prompts)
        tokenizer, device = self.engine.processor.tokenizer, self.engine.device
        ids, mask = (
            t.to(device) for t in tokenizer.encode_prompt([prompt.text for prompt in prompts])
        )
        options: dict[str, Any] = dict(self.settings)
        if self.stop:
            options["stopping_criteria"] = [StopAtText(tokenizer, self.stop)]
        if not goes_elsewhere(self.engine.model, options):
            options["custom_generate"] = admit
        return self.engine.model.generate(
            visual_features=self._states(prompts),
            input_ids=ids,
            attention_mask=mask,
            past_key_values=self._cache(prompts, ids),
            **options,
        )

    def _open(self, batch: ImageBatch) -> None:
        """Queues the prompts of the images of a batch."""
        entries = [Entry(n, [None] * len(self.asked(n))) for n in batch.numbers]
        if any(entry.texts for entry in entries):
            features = self._features(batch)
            for entry, image in zip(entries, features, strict=True):
                texts = enumerate(self.asked(entry.number))
                self.waiting += (Prompt(image, text, entry, place) for place, text in texts)
        self.order += sorted([*entries, *batch.broken], key=lambda each: each.number)

    def _features(self, batch: ImageBatch) -> Sequence[Any]:
        """What the prompts of each image need of it."""
        return vision_states(self.engine, batch.pixels).split(1)

    def _states(self, prompts: Sequence[Prompt]) -> Tensor:
        """The vision features (B, N, C_v) of B prompts."""
        return torch.cat([prompt.features for prompt in prompts])

    def _cache(self, prompts: Sequence[Prompt], ids: Tensor) -> KVCache:
        """What the prompts are read into."""
        return prompt_cache(self.engine, ids, self.settings)

    def _take(self, index: int, ids: Tensor) -> None:
        prompt = self.read.pop(index)
        text = self.engine.processor.tokenizer.decode(ids)
        prompt.entry.texts[prompt.place] = cut(text, self.stop).strip()


@torch.inference_mode()
def vision_states(engine: Embedder, pixels: Tensor) -> Tensor:
    """(batch, N, C_v) vision features."""
    return engine.model.vision_model(pixel_values=pixels.to(engine.device))[0]


def prompt_cache(engine: Embedder, ids: Tensor, settings: dict[str, Any]) -> KVCache:
    """A cache for the queries, the prompts ids (B, L) and the beginning of what is to come."""
    config = engine.model.config
    length = config.num_query_token + ids.shape[1]
    slots = first_slots(length, length + settings["max_new_tokens"])
    return KVCache(config.qllama_config, slots, disposable=True)


def _is_complete(entry: Entry | Outcome) -> bool:
    return isinstance(entry, Outcome) or None not in entry.texts
