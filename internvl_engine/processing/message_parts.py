"""One message in any of the forms that people have it: where its texts and its pictures are.

Forms of parts: transformers' {"type": "image", "image" | "url" | "path" | "base64": ...}, OpenAI's
{"type": "image_url", "image_url": {"url": ...}} with files and data: URLs, and the same for videos.
"""

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..printable import printable
from .sources import ImageError

PLACEHOLDER = re.compile("<(image|video)>")
ROLES = ("system", "user", "assistant")
TEXTS = ("text", "input_text", "output_text")
KINDS = {
    **dict.fromkeys(("image", "image_url", "input_image"), "image"),
    **dict.fromkeys(("video", "video_url", "input_video"), "video"),
}
FORM = '{"role": "user" | "assistant" | "system", "content": text or list of parts}'


class Picture(NamedTuple):
    """An image or a video of a conversation.

    source: what it is made from; None once it is read.
    kind: "image" or "video".
    placed: the caller wrote a placeholder for it, and what stands around it.
    tiles: (n, S, S, 3) uint8 once it is read; each frame of a video is a tile.
    """

    source: Any
    kind: str
    placed: bool
    tiles: Any = None

    def __repr__(self) -> str:
        what = "not read" if self.tiles is None else counted(len(self.tiles), "tile")
        return f"<{self.kind}, {what}>"


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
    """Pictures that were given beside a text, handed out in order.

    Args:
        images: sources of images.
        videos: sources of videos.
    """

    def __init__(self, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> None:
        self.given = {"image": list(images), "video": list(videos)}
        self.used = {"image": 0, "video": 0}

    def next(self, kind: str, placed: bool) -> Picture:
        """The next picture; one without a source where there are no more, see `check`."""
        number = self.used[kind]
        self.used[kind] += 1
        given = self.given[kind]
        return Picture(given[number] if number < len(given) else None, kind, placed)

    def rest(self) -> list[Picture]:
        """All that are left, without a place of their own."""
        left = [kind for kind, given in self.given.items() for _ in given[self.used[kind] :]]
        return [self.next(kind, False) for kind in left]

    def split(self, text: str) -> Iterator[str | Picture]:
        """A text with pictures in place of its placeholders."""
        for number, piece in enumerate(PLACEHOLDER.split(text)):
            if number % 2:
                yield self.next(piece, True)
            elif piece:
                yield piece

    def check(self) -> None:
        """Raises ValueError where there were not as many pictures as places for them."""
        for kind, given in self.given.items():
            if self.used[kind] != len(given):
                raise ValueError(
                    f"{counted(len(given), kind)} came with "
                    f"{counted(self.used[kind], 'place')} for "
                    f"{'it' if len(given) == 1 else 'them'}; write <{kind}> once for each"
                )


def read_message(message: Any, beside: Beside) -> list[Message]:
    """The message, or the two of a pair (question, answer); pictures are not opened yet.

    Args:
        message: see the head of this file; or {"role": ..., "content": text}, a pair, a Message.
        beside: pictures for the placeholders in texts, and for parts that only keep a place.

    Raises:
        TypeError, ValueError: no message; the message says what was needed.
    """
    if isinstance(message, Message):
        return [message]
    if is_pair(message):
        question, answer = message
        return [Message("user", tuple(beside.split(question))), Message("assistant", (answer,))]
    if not isinstance(message, Mapping) or "role" not in message:
        raise TypeError(f"needs {FORM}, got {kind_of(message)}")
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise ValueError(f"the role must be one of {', '.join(ROLES)}, got {role!r:.40}")
    if isinstance(content, str):  # only people ask about pictures; others may speak of "<image>"
        return [Message(role, tuple(beside.split(content) if role == "user" else [content]))]
    if isinstance(content, Mapping) or not isinstance(content, Iterable):
        raise TypeError(f"the content must be a text or a list of parts, got {kind_of(content)}")
    parts = [_part(part, beside) for part in content]
    return [Message(role, tuple(_placed(parts) if role == "user" else parts))]


def is_pair(message: Any) -> bool:
    """Whether this is a pair of texts."""
    return (
        isinstance(message, tuple | list)
        and not isinstance(message, Message)
        and len(message) == 2
        and all(isinstance(text, str) for text in message)
    )


def kind_of(value: Any) -> str:
    """What errors call a value."""
    if isinstance(value, Mapping):
        return f"a dict with keys {printable(list(value))}"
    return f"the text {value!r:.60}" if isinstance(value, str) else type(value).__name__


def counted(number: int, kind: str) -> str:
    """A number of things in words."""
    return f"{number} {kind}" + ("" if number == 1 else "s")


def _placed(parts: list[str | Picture]) -> list[str | Picture]:
    """The parts, with pictures at the placeholders that the texts among them may have."""
    texts = [part for part in parts if isinstance(part, str)]
    if not any(map(PLACEHOLDER.search, texts)):
        return parts
    pictures = [part for part in parts if isinstance(part, Picture)]
    sources = {kind: [p.source for p in pictures if p.kind == kind] for kind in ("image", "video")}
    own = Beside(sources["image"], sources["video"])
    found = [piece for text in texts for piece in own.split(text)]
    own.check()
    return found


def _part(part: Any, beside: Beside) -> str | Picture:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in TEXTS and isinstance(part.get("text"), str):
        return part["text"]
    if kind in KINDS:
        source = _payload(part, KINDS[kind])
        return beside.next(KINDS[kind], False) if source is None else (
            Picture(source, KINDS[kind], False)
        )  # fmt: skip
    what = f"a part of type {kind!r:.40}" if kind else kind_of(part)
    raise ValueError(
        'a part must be {"type": "text", "text": ...}, {"type": "image", "image": ...}, '
        '{"type": "image_url", "image_url": {"url": ...}} or {"type": "video", "video": ...}, got '
        f"{what}"
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
        raise ImageError(f"a picture given as base64 is damaged: {error}") from error
