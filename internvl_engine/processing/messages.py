"""Conversations in the forms that people have them -> messages of texts and pictures, in order.

Taken are lists of messages as OpenAI and transformers have them, pairs (question, answer) as the
published `chat` returns them, and `Message`. Pictures are parts of messages, or lie beside the
conversation: then every `<image>` (or `<video>`) in a question is the place of the next one.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .chat_templates import PLACE
from .message_parts import (
    FORM,
    PLACEHOLDER,
    Beside,
    Message,
    Picture,
    is_pair,
    kind_of,
    read_message,
)


def read_conversation(messages: Any, beside: Beside, whole: bool = True) -> list[Message]:
    """The messages of one conversation; their pictures are not opened yet.

    Pictures beside a single question that has no place for them come first in it.

    Args:
        messages: see the head of this file.
        beside: pictures that are not in the messages.
        whole: there is nothing else that these pictures are for.

    Raises:
        TypeError, ValueError: no conversation, or other places than pictures.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise TypeError(f"messages must be a list of {FORM}, got {kind_of(messages)}")
    found: list[Message] = []
    for number, message in enumerate(messages):
        try:
            found += read_message(message, beside)
        except (TypeError, ValueError) as error:
            raise type(error)(f"message {number}: {error}") from error
    if not found:
        raise ValueError("a conversation needs at least one message")
    if any(message.role == "system" for message in found[1:]):
        raise ValueError("only the first message may have the role system")
    if not whole:
        return found
    users = [number for number, message in enumerate(found) if message.role == "user"]
    if len(users) == 1 and not found[users[0]].pictures:
        parts = found[users[0]].parts
        found[users[0]] = Message("user", (*beside.rest(), *parts))
    beside.check()
    return found


def question_message(question: Any, beside: Beside) -> Message:
    """The message of a question; pictures that it has no place for come first.

    Raises:
        TypeError: the question is no text.
    """
    if not isinstance(question, str):
        raise TypeError(f"a question must be a text, got {kind_of(question)}")
    if PLACEHOLDER.search(question):
        return Message("user", tuple(beside.split(question)))
    return Message("user", (*beside.rest(), *([question] if question else [])))


def is_conversation(messages: Any) -> bool:
    """Whether this is one conversation, and not several."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        return False
    return all(isinstance(m, Message | Mapping) or is_pair(m) for m in messages)


def published_turns(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """(role, text) of each message, with `PLACE` for every image and every frame (or video, where
    they are not read).

    Images that nobody placed have a line each, numbered where a message has several.
    """
    turns, count = [], 0
    for message in messages:
        several = sum(picture.kind == "image" for picture in message.pictures) > 1
        text = ""
        for part in message.parts:
            if isinstance(part, str):
                text += part
            elif part.kind == "video":
                number = 0 if part.tiles is None else len(part.tiles)
                frames = [f"Frame-{i}: {PLACE}" for i in range(1, number + 1)]
                text += "\n".join(frames or [PLACE]) + ("" if part.placed else "\n")
            else:
                count += 1
                name = f"Image-{count}: " if several else ""
                text += PLACE if part.placed else f"{name}{PLACE}\n"
        turns.append((message.role, text))
    return turns


def jinja_turns(messages: Sequence[Message]) -> list[tuple[str, Any]]:
    """(role, content) of each message, as transformers' templates take them."""
    turns: list[tuple[str, Any]] = []
    for message in messages:
        parts: list[dict[str, str]] = []
        for part in message.parts:
            if isinstance(part, Picture) and not part.placed:
                parts.append({"type": part.kind})
                continue
            words = part if isinstance(part, str) else PLACE
            if parts and parts[-1]["type"] == "text":
                parts[-1]["text"] += words
            else:
                parts.append({"type": "text", "text": words})
        texts = [part["text"] for part in parts if part["type"] == "text"]
        turns.append((message.role, "".join(texts) if len(texts) == len(parts) else parts))
    return turns


def pictures_of(messages: Iterable[Message]) -> list[Picture]:
    """All pictures of a conversation, in order."""
    return [picture for message in messages for picture in message.pictures]


def tiles_of(pictures: Iterable[Picture]) -> list[Tensor]:
    """The tiles of pictures that were read, in order, each frame of a video by itself."""
    return [
        tiles
        for picture in pictures
        for tiles in (picture.tiles.split(1) if picture.kind == "video" else [picture.tiles])
    ]
