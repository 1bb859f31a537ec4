"""Text as it is generated: a streamer and a stopping rule on our own tokenizer.

transformers' TextIteratorStreamer is not used: an error in the generating thread leaves its reader
waiting for ever, and a reader that stops leaves the thread running.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from ..processing import InternVLTokenizer

UNFINISHED = "\ufffd"  # what the first bytes of a character decode to


class StopAtText(StoppingCriteria):
    """Ends a row whose text contains one of some strings, or every row once `stopped` is set."""

    def __init__(
        self,
        tokenizer: InternVLTokenizer,
        stop: Sequence[str],
        stopped: threading.Event | None = None,
    ) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = stopped or threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = [self.stopped.is_set() or self._contains_stop(row) for row in input_ids]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)

    def _contains_stop(self, row: torch.Tensor) -> bool:
        return bool(self.stop) and any(text in self.tokenizer.decode(row) for text in self.stop)


class PieceStreamer(BaseStreamer):
    """Hands over new text as soon as nothing that follows can change it.

    Args:
        tokenizer: decodes the ids.
        stop: texts before which the stream ends; what may be their beginning is held back.
        send: gets every piece.
    """

    def __init__(
        self, tokenizer: InternVLTokenizer, stop: Sequence[str], send: Callable[[str], object]
    ) -> None:
        self.tokenizer, self.stop, self.send = tokenizer, stop, send
        self.ids: list[int] = []
        self.sent = 0

    def put(self, value: torch.Tensor) -> None:
        """Takes the next ids of the only row."""
        self.ids += value.flatten().tolist()
        self._send_up_to(certain(self._text(), self.stop))

    def end(self) -> None:
        """Takes the end of the text: what was held back is part of it."""
        self._send_up_to(self._text().rstrip())

    def _text(self) -> str:
        return cut(self.tokenizer.decode(self.ids), self.stop).lstrip()

    def _send_up_to(self, text: str) -> None:
        if len(text) > self.sent:
            self.send(text[self.sent :])
            self.sent = len(text)


def cut(text: str, stop: Sequence[str]) -> str:
    """`text` up to the first of some strings in it."""
    return text[: min((text.index(s) for s in stop if s in text), default=len(text))]


def certain(text: str, stop: Sequence[str]) -> str:
    """The beginning of `text` that stays, whatever follows it.

    Left out are half characters, white space at the end, and the beginning of a stop text.
    """
    text = text.rstrip(UNFINISHED)
    starts = {s[:size] for s in stop for size in range(1, len(s) + 1)}
    held = max((len(start) for start in starts if text.endswith(start)), default=0)
    return text[: len(text) - held].rstrip()


def stream_text(
    generate: Callable[..., Any], tokenizer: InternVLTokenizer, stop: Sequence[str]
) -> Iterator[str]:
    """Runs `generate(streamer=..., stopping_criteria=...)` in a thread, and yields its text.

    An error there is raised here; leaving the iteration ends the generation after its step.
    """
    pieces: queue.Queue[str | BaseException | None] = queue.Queue()
    stopped = threading.Event()

    def work() -> None:
        try:
            generate(
                streamer=PieceStreamer(tokenizer, stop, pieces.put),
                stopping_criteria=[StopAtText(tokenizer, stop, stopped)],
            )
            pieces.put(None)
        except BaseException as error:  # noqa: BLE001  raised again in the reader's thread
            pieces.put(error)

    thread = threading.Thread(target=work, name="generate", daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        stopped.set()
        thread.join()
