"""Where a picture comes from: paths, bytes, streams, rows of data sets, arrays -> an opened image.

Nothing here waits or reads without a bound. A folder may hold a named pipe, a link to a device or a
sparse file of 200 GB under the name of a photo: those are errors at once. Only the open files of
this process (/dev/stdin, /dev/fd/63) are read as streams, because a shell hands pictures over so.

A file object or a PIL image may be given several times, and in several threads at once. Pillow
reads both lazily and unguarded, so whatever belongs to the caller is read under a lock.
"""

import errno
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError

from ..printable import printable
from .formats import is_heic, reason_unidentified, register_heif

MAX_PIXELS = 178_956_970  # where Pillow itself refuses; a 108-megapixel telephone photo passes
BYTES = bytes | bytearray | memoryview
CHUNK = 2**20  # bytes of a stream that are read at a time
STREAMS = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")
PICTURE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")  # in a row of a data set

# A picture that is shared is read under the lock of its address; others mostly under another.
_LOCKS = tuple(threading.Lock() for _ in range(64))
_PILLOW_LIMIT = threading.Lock()  # Image.MAX_IMAGE_PIXELS belongs to the whole process


class ImageError(ValueError):
    """An image that cannot be used; the message names it and says what is wrong with it."""


def max_bytes(max_pixels: int) -> int:
    """The largest file that is read: 16 bits in four channels, uncompressed, and 16 MiB beside."""
    return 8 * max_pixels + 2**24


def source_name(source: Any) -> str:
    """What errors call a source: its path, or the kind of object; one bounded line."""
    if isinstance(source, Mapping):
        path = source.get("path")
        return printable(path) if isinstance(path, str) and path else "image given as a row"
    if isinstance(source, str) and source.startswith("data:"):
        return f"image given as a data: URL of {len(source)} characters"
    if isinstance(source, str | os.PathLike):
        return printable(os.fspath(source)) or "''"
    inner = getattr(source, "filename", None) or getattr(source, "name", None)
    if isinstance(inner, str) and inner:
        return printable(inner)
    return f"image given as {type(source).__name__}"


def picture_in_row(row: Mapping[str, Any]) -> Any:
    """The picture in a row of `datasets`: {"bytes": ..., "path": ...}, or the column of images.

    Raises:
        TypeError: the row has no picture, or none under a known name.
    """
    if row.get("bytes") is not None:
        return row["bytes"]
    if row.get("path") is not None:
        return row["path"]
    for column in PICTURE_COLUMNS:
        if row.get(column) is not None:
            inner = row[column]
            return picture_in_row(inner) if isinstance(inner, Mapping) else inner
    raise TypeError(
        f"{source_name(row)}: needs a picture, got a dict with keys {printable(list(row))}; pass "
        "the value that is the picture"
    )


def check_type(source: Any, name: str) -> None:
    """Raises TypeError where this is no kind of picture."""
    known = Image.Image | np.ndarray | torch.Tensor | str | os.PathLike | BYTES
    if not isinstance(source, known) and not hasattr(source, "read"):
        raise TypeError(
            f"{name}: an image must be a PIL image, a path, bytes, a binary file, a numpy array "
            f"(H, W, 3) or a torch tensor (3, H, W); got {type(source).__name__}"
        )


def open_image(source: Any, name: str, max_pixels: int) -> Image.Image:
    """The image with its header read, from a source that `check_type` passes.

    Raises:
        FileNotFoundError: no such file.
        ImageError: no image, or none that is bounded.
    """
    if isinstance(source, torch.Tensor):
        source = _tensor_to_array(source, name)
    if isinstance(source, np.ndarray):
        return _array_to_image(source, name)
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, BYTES):
        return _open(BytesIO(source), name, max_pixels)
    if isinstance(source, str | os.PathLike):
        return _open_path(os.fspath(source), name, max_pixels)
    content = _read_stream(source, name, max_bytes(max_pixels))
    return _open(BytesIO(content), name, max_pixels)


@contextmanager
def held(source: Any) -> Iterator[None]:
    """Keeps other threads from reading the same object meanwhile."""
    opened = getattr(source, "fp", None) if isinstance(source, ImageFile.ImageFile) else None
    with _LOCKS[(id(source if opened is None else opened) >> 4) % len(_LOCKS)]:
        yield


def read_image_file(path: str | os.PathLike, max_pixels: int = MAX_PIXELS) -> bytes:
    """The content of an image file, in bounded time and memory.

    Args:
        path: a file.
        max_pixels: what no picture in it may exceed; files larger than such a one are refused.

    Raises:
        FileNotFoundError: no such file.
        ImageError: a folder, a named pipe, a device, or too large a file.
        OSError: it cannot be read.
    """
    name = source_name(path)
    size = _regular_size(path, name)
    limit = max_bytes(max_pixels)
    if size > limit:
        raise ImageError(
            f"{name}: has {size} bytes, more than any picture of {max_pixels} pixels needs; "
            "raise max_pixels if it is trusted"
        )
    with open(path, "rb") as file:
        return file.read(size + 1)  # not more, if it grows meanwhile


def _regular_size(path: str | bytes | os.PathLike, name: str) -> int:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = "; download it first" if "://" in name else ""
        raise FileNotFoundError(f"{name}: no such image file{hint}") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise _not_a_path(name, os.fsdecode(path)) from error
        raise
    if not stat.S_ISREG(status.st_mode):  # a named pipe would wait for ever, a device never end
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise ImageError(f"{name}: is {kind}")
    return status.st_size


def _not_a_path(name: str, text: str) -> ImageError:
    return ImageError(
        f"{name}: is text of {len(text)} characters, not a path; decode it first, as with "
        'base64.b64decode(text.rpartition(",")[2]), and pass the bytes'
    )


def _open_path(path: str | bytes, name: str, max_pixels: int) -> Image.Image:
    text = os.fsdecode(path)
    if text.startswith("data:"):
        raise _not_a_path(name, text)
    if "\0" in text:
        raise ImageError(f"{name}: a path cannot hold a null character; pass bytes as bytes")
    if text.startswith(STREAMS) and os.path.exists(path):
        with open(path, "rb") as file:
            content = _read_stream(file, name, max_bytes(max_pixels))
        return _open(BytesIO(content), name, max_pixels)
    _regular_size(path, name)
    return _open(path, name, max_pixels)


def _read_stream(file: Any, name: str, limit: int) -> bytes:
    """All of a binary file object, from its beginning where it has one."""
    with held(file):
        if getattr(file, "seekable", lambda: hasattr(file, "seek"))():
            file.seek(0)
        content = bytearray()
        while part := file.read(CHUNK):  # a pipe gives less than it is asked for
            if isinstance(part, str):
                raise ImageError(f"{name}: is open as text; open it with mode 'rb'")
            content += part
            if len(content) > limit:
                raise ImageError(
                    f"{name}: has more than {limit} bytes; raise max_pixels if it is trusted"
                )
    return bytes(content)


def _open(file: Any, name: str, max_pixels: int) -> Image.Image:
    try:
        return _open_within(file, max_pixels)
    except UnidentifiedImageError:
        head = _head(file)
    if is_heic(head) and register_heif():
        return _open_within(file, max_pixels)
    raise ImageError(f"{name}: not a readable image: {reason_unidentified(head)}")


def _open_within(file: Any, max_pixels: int) -> Image.Image:
    with pillow_limit(max_pixels):
        return Image.open(file)


@contextmanager
def pillow_limit(pixels: int) -> Iterator[None]:
    """Raises Pillow's own limit meanwhile, where pictures of so many pixels exceed it."""
    if pixels <= MAX_PIXELS:
        yield
        return
    with _PILLOW_LIMIT:
        limit = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None if limit is None else max(limit, pixels)
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _head(file: Any) -> bytes:
    if isinstance(file, BytesIO):
        return file.getvalue()[:64]
    with open(file, "rb") as opened:
        return opened.read(64)


def _tensor_to_array(pixels: torch.Tensor, name: str) -> np.ndarray:
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] not in (1, 3, 4):
        raise ImageError(
            f"{name}: a tensor image must be uint8 (3, H, W), got {pixels.dtype} "
            f"{tuple(pixels.shape)}; for normalised values see to_images"
        )
    return pixels.detach().cpu().permute(1, 2, 0).contiguous().numpy()


def _array_to_image(pixels: np.ndarray, name: str) -> Image.Image:
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ImageError(
            f"{name}: an array image must be uint8 (H, W) or (H, W, 3), channels last, got "
            f"{pixels.dtype} {pixels.shape}"
        )
    if pixels.size == 0:
        raise ImageError(f"{name}: is empty, shape {pixels.shape}")
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and channels == 1 else pixels)
