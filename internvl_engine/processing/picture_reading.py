"""Pictures of conversations and prompts: which belongs where, opened and cut into tiles."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .chat_prompts import ChatPrompts
from .images import is_one_image
from .message_parts import Beside, Message, Picture, counted, kind_of
from .messages import is_conversation, pictures_of, question_message, read_conversation
from .tiles import InternVLTileProcessor
from .video import PICTURES, video_frames

DECODING_THREADS = min(8, os.cpu_count() or 1)


class PictureReading:
    """What a processor does with pictures.

    Args:
        image_processor: cuts images into tiles.
    """

    prompts: ChatPrompts

    def __init__(self, image_processor: InternVLTileProcessor) -> None:
        self.image_processor = image_processor

    def read(
        self, messages: Any, images: Any = None, videos: Any = None, **limits: Any
    ) -> list[Message]:
        """One conversation as messages, with its pictures opened and cut into tiles.

        Args: as `conversation`, and the limits of `opened`.

        Raises:
            TypeError, ValueError: no conversation, other places than pictures, or a picture that
                cannot be used.
            FileNotFoundError: no such picture.
        """
        return self.opened(conversation(messages, images, videos), **limits)

    def read_all(
        self, messages: Any, images: Any = None, videos: Any = None, **limits: Any
    ) -> list[list[Message]]:
        """One conversation or several; pictures beside several are a list for each."""
        return [self.opened(row, **limits) for row in conversations(messages, images, videos)]

    def pictures(self, images: Any = None, videos: Any = None, **limits: Any) -> list[Picture]:
        """Images and videos by themselves, read."""
        return self._read(Beside(listed(images), listed_videos(videos)).rest(), **limits)

    def pictures_of_texts(
        self, texts: Any, images: Any = None, videos: Any = None, **limits: Any
    ) -> tuple[list[str], list[list[Picture]]]:
        """Finished prompts as a list, and the pictures for the places in each, read.

        Args:
            texts: one prompt or several.
            images: for all of them in order; or a list for each.
            videos: the same.
        """
        rows = [texts] if isinstance(texts, str) else list(texts)
        for row in rows:
            if not isinstance(row, str):
                raise TypeError(f"text must be a string or several, got {kind_of(row)}")
        kinds = [self.prompts.places(row) for row in rows]
        if _is_nested(images, len(rows)) or _is_nested(videos, len(rows)):
            given = zip(
                of_rows(images, len(rows), "images"),
                of_rows(videos, len(rows), "videos"),
                strict=True,
            )
            besides = [Beside(listed(i), listed_videos(v)) for i, v in given]
        else:
            besides = [Beside(listed(images), listed_videos(videos))] * len(rows)
        found = [
            [beside.next(kind, True) for kind in row]
            for row, beside in zip(kinds, besides, strict=True)
        ]
        for beside in besides:
            beside.check()
        return rows, [self._read(row, **limits) for row in found]

    def opened(self, messages: Iterable[Message], **limits: Any) -> list[Message]:
        """The messages with those pictures read that are not.

        Args:
            messages: of one conversation.
            limits: max_tiles of an image and num_frames of a video, None for the usual; `share`,
                whether all images of the conversation share that many tiles.
        """
        messages = list(messages)
        found = iter(self._read(pictures_of(messages), **limits))
        return [
            Message(m.role, tuple(next(found) if isinstance(p, Picture) else p for p in m.parts))
            for m in messages
        ]

    def _read(
        self,
        pictures: Sequence[Picture],
        max_tiles: int | None = None,
        num_frames: int | None = None,
        share: bool = False,
    ) -> list[Picture]:
        images = [p.source for p in pictures if p.kind == "image" and p.tiles is None]
        most = self.image_processor.max_tiles if max_tiles is None else max_tiles
        if share and images:
            most = max(1, most // len(images))
        workers = min(DECODING_THREADS, max(len(images), 1))
        cut = iter(self.image_processor.tiles(images, max_tiles=most, workers=workers))

        def read(picture: Picture) -> Picture:
            if picture.tiles is not None:
                self._check(picture.tiles)
                return picture
            if picture.kind == "image":
                return picture._replace(source=None, tiles=next(cut))
            frames = video_frames(picture.source, num_frames)
            tiles = torch.cat(self.image_processor.frames(frames, workers=DECODING_THREADS))
            return picture._replace(source=None, tiles=tiles)

        return [read(picture) for picture in pictures]

    def _check(self, tiles: Any) -> None:
        side = self.image_processor.size
        if not isinstance(tiles, Tensor) or tiles.shape[1:] != (side, side, 3):
            shape = tuple(tiles.shape) if isinstance(tiles, Tensor) else type(tiles).__name__
            raise ValueError(
                f"the history has tiles of another model, {shape}; needed are "
                f"(n, {side}, {side}, 3)"
            )


def conversation(messages: Any, images: Any = None, videos: Any = None) -> list[Message]:
    """One conversation as messages; its pictures are not opened yet.

    Args:
        messages: a list of {"role": "user" | "assistant" | "system", "content": ...}, whose
            content is a text, or a list of parts as OpenAI's and transformers' interfaces have
            them; pairs (question, answer); messages that were read before.
        images: for `<image>` in the user's texts, in order; a single question that has no such
            place takes them in front.
        videos: the same for `<video>`.
    """
    return read_conversation(messages, Beside(listed(images), listed_videos(videos)))


def conversations(messages: Any, images: Any = None, videos: Any = None) -> list[list[Message]]:
    """One conversation or several; pictures beside several are a list for each."""
    if is_conversation(messages) or not isinstance(messages, Iterable):
        return [conversation(messages, images, videos)]
    rows = list(messages)
    given = zip(
        of_rows(images, len(rows), "images"), of_rows(videos, len(rows), "videos"), strict=True
    )
    return [conversation(row, *beside) for row, beside in zip(rows, given, strict=True)]


def with_question(
    history: Any, question: Any, images: Any = None, videos: Any = None
) -> list[Message]:
    """A conversation that goes on with a question; its pictures are not opened yet.

    Pictures belong to the places in the history that lack theirs, then to the question, in front
    of it where it has no places.

    Args:
        history: as messages of `conversation`; None or none for a first question.
        question: a text.
        images: of the history and the question, in order.
        videos: the same.
    """
    beside = Beside(listed(images), listed_videos(videos))
    before = read_conversation(history, beside, whole=False) if history else []
    messages = [*before, question_message(question, beside)]
    beside.check()
    return messages


def listed(images: Any) -> list[Any]:
    """One image, or several of any kind, as a list; lists in it are spread."""
    if images is None:
        return []
    if is_one_image(images):
        return [images]
    return [image for item in images for image in (listed(item) if _is_list(item) else [item])]


def listed_videos(videos: Any) -> list[Any]:
    """One video, or several, as a list. A list of pictures is one video."""
    if videos is None:
        return []
    if isinstance(videos, str | os.PathLike) or not isinstance(videos, Iterable):
        return [videos]
    if isinstance(videos, np.ndarray | Tensor):
        return [videos] if videos.ndim < 5 else list(videos)
    found = list(videos)
    return [found] if found and all(map(_is_frame, found)) else found


def of_rows(given: Any, rows: int, name: str) -> list[Any]:
    """Pictures for each of several rows.

    Raises:
        ValueError: they are not a list for each.
    """
    if given is None:
        return [None] * rows
    if isinstance(given, str | bytes | Mapping) or is_one_image(given) or len(given) != rows:
        came = 1 if is_one_image(given) else len(given)
        raise ValueError(
            f"{counted(rows, 'conversation')} came with {came} {name}; give a list with one item "
            "for each: a picture, a list of them, or None"
        )
    return list(given)


def _is_list(item: Any) -> bool:
    return item is None or isinstance(item, list | tuple) or not is_one_image(item)


def _is_nested(given: Any, rows: int) -> bool:
    return isinstance(given, list | tuple) and len(given) == rows and any(map(_is_list, given))


def _is_frame(item: Any) -> bool:
    """Whether this is a picture, and not a video."""
    if isinstance(item, str | os.PathLike):
        return Path(item).suffix.lower() in PICTURES
    return is_one_image(item)
