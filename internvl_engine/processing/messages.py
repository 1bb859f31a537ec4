"""Conversations in the forms that people have them -> messages of text and pictures, in order.

Taken are OpenAI's and transformers' lists of {"role": ..., "content": ...}, with a text or a list
of parts as content; pairs (question, answer) as the published `chat` returns them; and `Message`.
Pictures stand in parts, or beside the conversation: then every `<image>` (or `<video>`) in a text
is the place of the next one.
"""

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..printable import printable
from .chat_templates import PLACE
from .sources import ImageError

PLACEHOLDER = re.compile("<(image|video)>")
ROLES = ("system", "user", "assistant")
TEXT, IMAGE, VIDEO = (
    ("text", "input_text", "output_text"),
    ("image", "image_url", "input_image"),
    ("video", "video_url", "input_video"),
)  # fmt: skip
FORM = '{"role": "user" | "assistant" | "system", "content": text or list of parts}'


class Picture(NamedTuple):
    """An image or a video of a conversation.

    source: what it is made from; its tiles, (n, S, S, 3) uint8, once it is read. Each frame of a
        video is a tile.
    kind: "image" or "video".
    placed: the caller wrote a placeholder for it, and what stands around it.
    """

    source: Any
    kind: str
    placed: bool


class Message(NamedTuple):
    """What one side says: texts and pictures in order. A list of them is a history."""

    role: str
    parts: tuple[str | Picture, ...]

    @property
    def pictures(self) -> list[Picture]:
        return [part for part in self.parts if isinstance(part, Picture)]

    @property
    def text(self) -> str:
        """The words, with `<image>` and `<video>` where pictures are."""
        return "".join(p if isinstance(p, str) else f"<{p.kind}>" for p in self.parts)


class Beside:
    """Pictures that were given beside a conversation, handed out in order.

    Args:
        images: sources of images.
        videos: sources of videos.
    """

    def __init__(self, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> None:
        self.given = {"image": list(images), "video": list(videos)}
        self.used = {"image": 0, "video": 0}

    def next(self, kind: str, placed: bool) -> Picture:
        number = self.used[kind]
        self.used[kind] += 1
        given = self.given[kind]
        return Picture(given[number] if number < len(given) else None, kind, placed)

    def check(self) -> None:
        """Raises ValueError where there were not as many pictures as places for them."""
        for kind, given in self.given.items():
            if self.used[kind] != len(given):
                raise ValueError(
                    f"{_count(len(given), kind)} came with {self.used[kind]} places for "
                    f"{'it' if len(given) == 1 else 'them'}; write <{kind}> once for each"
                )


def read_conversation(messages: Any, beside: Beside) -> list[Message]:
    """The messages of one conversation, their pictures not yet read.

    Args:
        messages: see the head of this file.
        beside: pictures that are not in the messages.

    Raises:
        TypeError, ValueError: no conversation; the message says what was needed.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Iterable):
        raise TypeError(f"messages must be a list of {FORM}, got {_kind(messages)}")
    found: list[Message] = []
    for number, message in enumerate(messages):
        try:
            found += _read(message, beside)
        except (TypeError, ValueError) as error:
            raise type(error)(f"message {number}: {error}") from error
    if not found:
        raise ValueError("messages has no message")
    if any(message.role == "system" for message in found[1:]):
        raise ValueError("only the first message may have the role system")
    return found


def ask(question: str, beside: Beside) -> Message:
    """The message of a question; pictures that it has no place for go in front.

    Raises:
        TypeError: the question is no text.
        ValueError: it has other places than there are pictures.
    """
    if not isinstance(question, str):
        raise TypeError(f"a question must be a text, got {_kind(question)}")
    kinds = [kind for kind, given in beside.given.items() for _ in given[beside.used[kind] :]]
    if PLACEHOLDER.search(question) or not kinds:
        return Message("user", tuple(_split(question, beside)))
    pictures = [beside.next(kind, False) for kind in kinds]
    return Message("user", (*pictures, *([question] if question else [])))


def is_conversation(messages: Any) -> bool:
    """Whether this is one conversation, and not several."""
    return bool(messages) and all(isinstance(m, Message | Mapping) or _is_pair(m) for m in messages)


def published_texts(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """(role, text) of each message, with `PLACE` for every tile group, as published prompts have it.

    Images that nobody placed become lines of their own, numbered where a message has several.
    """
    turns, count = [], 0
    for message in messages:
        several = len(message.pictures) > 1
        text = ""
        for part in message.parts:
            if isinstance(part, str):
                text += part
            elif part.kind == "video":
                frames = [f"Frame-{i}: {PLACE}" for i in range(1, len(part.source) + 1)]
                text += "\n".join(frames) + ("" if part.placed else "\n")
            else:
                count += 1
                name = f"Image-{count}: " if several else ""
                text += PLACE if part.placed else f"{name}{PLACE}\n"
        turns.append((message.role, text))
    return turns


def jinja_contents(messages: Sequence[Message]) -> list[tuple[str, Any]]:
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


def _read(message: Any, beside: Beside) -> Iterator[Message]:
    if isinstance(message, Message):
        yield message
    elif _is_pair(message):
        yield Message("user", tuple(_split(message[0], beside)))
        yield Message("assistant", (message[1],))
    elif not isinstance(message, Mapping) or "role" not in message:
        raise TypeError(f"needs {FORM}, got {_kind(message)}")
    elif message["role"] not in ROLES:
        raise ValueError(f"the role must be one of {', '.join(ROLES)}, got {message['role']!r:.40}")
    else:
        content = message.get("content")
        if isinstance(content, str):
            is_user = message["role"] == "user"
            yield Message(message["role"],
                          tuple(_split(content, beside) if is_user else [content]))  # fmt: skip
        else:
            yield Message(message["role"], tuple(_parts(content, beside)))


def _is_pair(message: Any) -> bool:
    return (
        isinstance(message, tuple | list)
        and len(message) == 2
        and all(isinstance(text, str) for text in message)
        and not isinstance(message, Message)
    )


def _split(text: str, beside: Beside) -> Iterator[str | Picture]:
    """A text at its placeholders."""
    for number, piece in enumerate(PLACEHOLDER.split(text)):
        if number % 2:
            yield beside.next(piece, True)
        elif piece:
            yield piece


def _parts(content: Any, beside: Beside) -> list[str | Picture]:
    """The parts of a content that is a list."""
    if isinstance(content, Mapping) or not isinstance(content, Iterable):
        raise TypeError(f"the content must be a text or a list of parts, got {_kind(content)}")
    found = [_part(part, beside) for part in content]
    places = sum(len(PLACEHOLDER.findall(part)) for part in found if isinstance(part, str))
    pictures = [part for part in found if isinstance(part, Picture)]
    if not places:
        return found
    if places != len(pictures):
        raise ValueError(
            f"{_count(len(pictures), 'picture')} came with {places} of <image> and <video> in the "
            "text; write one for each, or none"
        )
    queues = {kind: [p.source for p in pictures if p.kind == kind] for kind in ("image", "video")}
    own = Beside(queues["image"], queues["video"])
    texts = (part for part in found if isinstance(part, str))
    split = [piece for text in texts for piece in _split(text, own)]
    own.check()
    return split


def _part(part: Any, beside: Beside) -> str | Picture:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in TEXT and isinstance(part.get("text"), str):
        return part["text"]
    for name, kinds in (("image", IMAGE), ("video", VIDEO)):
        if kind in kinds:
            source = _payload(part, name)
            return beside.next(name, False) if source is None else Picture(source, name, False)
    what = f"a part of type {kind!r:.40}" if kind else _kind(part)
    raise ValueError(
        'a part must be {"type": "text", "text": ...}, {"type": "image", "image": ...}, '
        f'{{"type": "image_url", "image_url": {{"url": ...}}}} or {{"type": "video", ...}}, got {what}'
    )


def _payload(part: Mapping[str, Any], kind: str) -> Any:
    """The picture in a part; None where it only keeps a place."""
    for key in (kind, f"{kind}_url", "url", "path", "base64"):
        value = part.get(key)
        if value is None:
            continue
        if isinstance(value, Mapping) and "url" in value:
            value = value["url"]
        if key == "base64":
            return _decoded(value)
        if isinstance(value, str) and value.startswith("data:"):
            return _decoded(value.partition(",")[2])
        return value.removeprefix("file://") if isinstance(value, str) else value
    return None


def _decoded(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise ImageError(f"an image as base64 is damaged: {error}") from error


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a dict with keys {printable(list(value))}"
    return (
        f"{type(value).__name__} {value!r:.60}"
        if isinstance(value, str)
        else (type(value).__name__)
    )


def _count(number: int, kind: str) -> str:
    return f"{number} {kind}" + ("" if number == 1 else "s")


def tiles_of(messages: Iterable[Message]) -> list[Tensor]:
    """The tiles of all pictures, in order, each frame of a video by itself."""
    return [
        tiles
        for message in messages
        for picture in message.pictures
        for tiles in (picture.source.split(1) if picture.kind == "video" else [picture.source])
    ]
