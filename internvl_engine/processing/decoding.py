"""Anything a photo comes in -> one upright 8-bit RGB picture, or an error that names it.

Transparency is dropped and palettes are looked up as `convert("RGB")` does, which is what the
published pipelines feed the model. Three things differ from a bare `convert("RGB")`, each because
it gives a wrong picture: 16-bit grey is scaled to 8 bits (Pillow clips it to white), EXIF rotation
is applied, and premultiplied colours are divided by their alpha.

EXIF rotation belongs to files, and to images as Image.open gives them. A picture that was made from
one by transpose, rotate, convert ... still carries the tag, turned or not, and is taken as it is.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from ..printable import printable
from .sources import (
    MAX_PIXELS,
    ImageError,
    check_type,
    held,
    open_image,
    picture_in_row,
    pillow_limit,
    source_name,
)

MAX_ASPECT_RATIO = 100.0
FORMATS_THAT_RUN_PROGRAMS = ("EPS", "WMF")  # Pillow decodes EPS by starting Ghostscript
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(
    source: Any,
    *,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    max_aspect_ratio: float = MAX_ASPECT_RATIO,
    draft_side: int | None = None,
) -> Image.Image:
    """Opens one image, upright and in RGB.

    Args:
        source: PIL image, path, bytes, binary file object, uint8 numpy array (H, W), (H, W, 1),
            (H, W, 3) or (H, W, 4), uint8 torch tensor (1 | 3 | 4, H, W), or a row of `datasets`,
            {"bytes": ..., "path": ...} or {"image": ...}. The first frame of an animation; the
            current one where a PIL image is given. One object may be given in several threads.
        name: what an error calls it; None takes the path or the kind of object.
        max_pixels: larger images are refused before they are decoded.
        max_aspect_ratio: longer ones are refused: nothing of them is left at the model's size.
        draft_side: let a JPEG decoder shrink to no less than this side. Several times faster on
            large photos, and not pixel-exact; None decodes exactly.

    Returns:
        RGB image. It may be `source` itself, which is never changed.

    Raises:
        FileNotFoundError: no such file.
        ImageError: not an image, damaged, truncated, too large or too long, or without a meaning
            as 8-bit colours. It is a ValueError.
        TypeError: not one of the sources above.
    """
    name = name or source_name(source)
    if isinstance(source, Mapping):
        source = picture_in_row(source)
    check_type(source, name)
    limits = (name, max_pixels, max_aspect_ratio)
    try:
        # Only what the caller holds is shared with others: the rest is decoded side by side.
        with held(source) if isinstance(source, ImageFile.ImageFile) else nullcontext():
            image = open_image(source, name, max_pixels)
            with image if image is not source else nullcontext():
                turn = _load(image, limits, None if image is source else draft_side)
        picture = _to_rgb(image, name)
        return picture if turn is None else picture.transpose(turn)
    except (FileNotFoundError, ImageError):
        raise
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        what = printable(getattr(error, "strerror", None) or error, 300) or type(error).__name__
        raise ImageError(f"{name}: not a readable image: {what}") from error


def _load(
    image: Image.Image, limits: tuple[str, int, float], draft_side: int | None
) -> Image.Transpose | None:
    """Decodes an opened image; how it must then be turned."""
    _check_size(image.size, *limits)
    if image.format in FORMATS_THAT_RUN_PROGRAMS:
        raise ImageError(f"{limits[0]}: {image.format} files are programs, not pictures")
    if draft_side is not None:
        image.draft("RGB", (draft_side, draft_side))
    with pillow_limit(image.width * image.height):  # which TIFF looks at once more
        image.load()
    _check_size(image.size, *limits)  # icons choose on load
    return _turn(image)


def _check_size(size: tuple[int, int], name: str, max_pixels: int, max_aspect_ratio: float) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: is empty, {width} x {height} pixels")
    if width * height > max_pixels:
        raise ImageError(
            f"{name}: {width} x {height} is {width * height} pixels, more than {max_pixels}; "
            "raise max_pixels if it is trusted"
        )
    if max(size) > max_aspect_ratio * min(size):
        raise ImageError(
            f"{name}: {width} x {height} is longer than {max_aspect_ratio:g} to 1; cut it into "
            "parts, or raise max_aspect_ratio"
        )


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    mode = image.mode
    if mode == "RGB":
        return image
    if mode == "F":
        raise ImageError(
            f"{name}: floating-point pixels have no agreed range; scale them to 0..255 uint8"
        )
    if mode.startswith("I"):
        image = _scale_to_8_bits(image, name)
    elif mode in ("RGBa", "La"):  # premultiplied: convert("RGB") would leave the colours dark
        image = image.convert(mode.upper())
    elif mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # same colours; straight to RGB, Pillow warns on each file
    return image.convert("RGB")


def _scale_to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """Grey of 16 bits scaled by 255 / 65535 and rounded.

    Mode "I" (32 bits) does not say its range: a PNG's is 16 bits (Pillow before 11.3 opens them
    so), anything else is 8 bits where every value fits and 16 where one does not.
    """
    grey = np.asarray(image).astype(np.int64)
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65535:
        raise ImageError(f"{name}: grey values {low}..{high} do not fit in 16 bits")
    if image.mode.startswith("I;16") or image.format == "PNG" or high > 255:
        grey = (grey + 128) // 257
    return Image.fromarray(grey.astype(np.uint8))


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How an image as it was opened must be turned to stand upright."""
    if not isinstance(image, ImageFile.ImageFile):
        return None
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # noqa: BLE001  damaged EXIF raises nearly anything; the photo is readable
        return None
    return UPRIGHT.get(orientation) if isinstance(orientation, int) else None
