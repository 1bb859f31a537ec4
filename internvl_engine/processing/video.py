"""Frames of videos: from lists, arrays, folders of pictures, animations, and files by a decoder.

No decoder is a dependency. A video file is read by PyAV, decord or OpenCV, whichever is installed.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence
from torch import Tensor

from ..printable import printable
from .sources import BYTES, ImageError

FRAMES_OF_A_FILE = 8  # as the published example takes of a video
PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
ANIMATIONS = {".gif", ".webp", ".apng", ".png"}


def video_frames(video: Any, num_frames: int | None = None) -> list[Any]:
    """The frames of one video, each a picture that `load_image` opens.

    Args:
        video: a list of pictures, uint8 frames (T, H, W, 3) as array or (T, 3, H, W) as tensor, a
            folder of pictures (taken in the order of the numbers in their names), an animation,
            or a video file.
        num_frames: take so many, each the middle of an equal part of the video; None takes all,
            of a video file 8. What has fewer gives all it has.

    Raises:
        FileNotFoundError: no such file or folder.
        ImageError: no frames, or a file that cannot be decoded.
        ImportError: a video file, and no package that decodes it.
        TypeError: no video in any of these forms.
    """
    if num_frames is not None and (not isinstance(num_frames, int) or num_frames < 1):
        raise ValueError(f"num_frames must be a whole number of 1 or more, got {num_frames!r}")
    if isinstance(video, str | os.PathLike):
        return _of_path(Path(video), num_frames)
    if isinstance(video, np.ndarray | Tensor) and video.ndim != 4:
        raise ImageError(
            f"a video as {type(video).__name__} must be (T, H, W, 3) or, as tensor, "
            f"(T, 3, H, W), got {tuple(video.shape)}"
        )
    if isinstance(video, BYTES | Image.Image) or not isinstance(video, Iterable):
        raise TypeError(
            "a video must be a list of frames, an array (T, H, W, 3), a folder or a file, got "
            f"{type(video).__name__}"
        )
    return _some(list(video), num_frames, "the video")


def middles(count: int, wanted: int | None) -> list[int]:
    """Places of `wanted` of `count` frames, each in the middle of an equal part; all for None."""
    wanted = count if wanted is None else min(wanted, count)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def _some(frames: Sequence[Any], num_frames: int | None, name: str) -> list[Any]:
    if not frames:
        raise ImageError(f"{name} has no frames")
    return [frames[i] for i in middles(len(frames), num_frames)]


def _of_path(path: Path, num_frames: int | None) -> list[Any]:
    name = printable(path)
    if path.is_dir():
        files = [f for f in path.iterdir() if f.suffix.lower() in PICTURES and f.name[0] != "."]
        return _some(sorted(files, key=_by_numbers), num_frames, f"the folder {name}")
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no such video, nor folder of frames")
    if path.suffix.lower() in ANIMATIONS:
        with Image.open(path) as opened:
            frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(opened)]
        return _some(frames, num_frames, name)
    wanted = FRAMES_OF_A_FILE if num_frames is None else num_frames
    for package, decode in DECODERS.items():
        try:
            module = import_module(package)
        except ImportError:
            continue
        try:
            return _some(decode(module, str(path), wanted), None, name)
        except ImageError:
            raise
        except Exception as error:  # every decoder has its own
            raise ImageError(f"{name}: not a readable video: {printable(error, 300)}") from error
    raise ImportError(
        f"{name}: reading a video file needs a decoder: pip install av (or decord, or "
        "opencv-python); a folder or a list of frames needs none"
    )


def _by_numbers(path: Path) -> list[tuple[int, int | str]]:
    """frame2 before frame10."""
    pieces = re.split(r"(\d+)", path.name)
    return [(0, int(piece)) if piece.isdecimal() else (1, piece) for piece in pieces]


def _by_av(av: Any, path: str, wanted: int) -> list[Any]:
    with av.open(path) as container:
        count = sum(1 for _ in container.decode(video=0))
    places = set(middles(count, wanted)) if count else set()
    with av.open(path) as container:
        decoded = enumerate(container.decode(video=0))
        return [frame.to_ndarray(format="rgb24") for place, frame in decoded if place in places]


def _by_decord(decord: Any, path: str, wanted: int) -> list[Any]:
    reader = decord.VideoReader(path, num_threads=1)
    return [reader[i].asnumpy() for i in middles(len(reader), wanted)] if len(reader) else []


def _by_opencv(cv2: Any, path: str, wanted: int) -> list[Any]:
    def read(places: set[int]) -> tuple[list[Any], int]:
        """Frames at some places, and how many there are, which files do not always know."""
        capture, count = cv2.VideoCapture(path), 0
        found: list[Any] = []
        while capture.grab():
            if count in places:
                sound, pixels = capture.retrieve()
                found += [np.ascontiguousarray(pixels[..., ::-1])] if sound else []
            count += 1
        capture.release()
        return found, count

    count = read(set())[1]
    return read(set(middles(count, wanted)))[0] if count else []


DECODERS: dict[str, Callable[[Any, str, int], list[Any]]] = {
    "av": _by_av,
    "decord": _by_decord,
    "cv2": _by_opencv,
}
