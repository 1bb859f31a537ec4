"""Pictures that stay what they were when they were handed over.

The next batch is decoded in other threads while the present one is computed. The items of a list
lie side by side until then; an iterator may yield one buffer, one PIL image or one path again and
again, each time with another picture in it. What an iterator yields is therefore settled at once:
copied, or where that is smaller, read.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageFile
from torch import Tensor

from ..processing import ImageError, load_image
from ..processing.images import is_one_image
from ..processing.sources import held

READ_AT_ONCE = 2**28  # bytes of a file: larger ones are read where they are decoded


def pictures(images: Any) -> Iterator[Any]:
    """One picture, or those of an iterable, in a form that nobody else changes.

    Args:
        images: as `InternVLImageProcessor` takes them.
    """
    if is_one_image(images):
        return iter([images])
    if isinstance(images, list | tuple | np.ndarray | Tensor):
        return iter(images)
    return map(settled, images)


class NamedBytes(BytesIO):
    """The content of a file, with its name for messages."""

    def __init__(self, content: bytes, name: Any) -> None:
        super().__init__(content)
        self.name = name


def settled(source: Any) -> Any:
    """A picture as it is now. One that cannot be used comes back as it is: decoding says why."""
    if isinstance(source, Image.Image):
        return _unread(source) or _decoded(source)
    if isinstance(source, np.ndarray):
        return source.copy()
    if isinstance(source, Tensor):
        return source.detach().clone()
    if isinstance(source, bytearray | memoryview):
        return bytes(source)
    if isinstance(source, Mapping):  # a row of a data set
        return {key: settled(value) for key, value in source.items()}
    if isinstance(source, str | os.PathLike):
        return _content(source)
    if hasattr(source, "read"):
        with held(source):
            return NamedBytes(_everything(source), getattr(source, "name", None))
    return source


def _everything(file: Any) -> bytes:
    """All of a binary file object, from its beginning where it has one."""
    if getattr(file, "seekable", lambda: hasattr(file, "seek"))():
        file.seek(0)
    return file.read()


def _unread(image: Any) -> NamedBytes | None:
    """The file of a picture that was opened and not decoded yet; None where that says less.

    Decoding is left to other threads so. Whatever was done to the picture since it was opened
    (another frame, a draft, another orientation) shows in one of the things compared.
    """
    if not isinstance(image, ImageFile.ImageFile):
        return None
    with held(image):
        if image.fp is None or not image.tile or image.tell():
            return None
        try:
            place = image.fp.tell()
            content = NamedBytes(_everything(image.fp), image.filename)
            image.fp.seek(place)
            again: Any = Image.open(content)
            names = ("size", "mode", "format", "tile")
            same = all(getattr(again, name) == getattr(image, name) for name in names)
            return content if same and dict(again.getexif()) == dict(image.getexif()) else None
        except Exception:  # noqa: BLE001  closed, damaged, or of no file of its own
            return None


def _decoded(image: Image.Image) -> Any:
    try:
        return np.array(load_image(image))
    except (ImageError, TypeError):
        return image


def _content(path: Any) -> Any:
    """What is in a file now; the path where this is no place to read it."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > READ_AT_ONCE:
            return path
        with open(path, "rb") as file:
            return NamedBytes(file.read(), os.fsdecode(path))
    except (OSError, ValueError):
        return path
