"""Anything a photo comes in -> one upright 8-bit RGB picture, or an error that names it.

Transparency is dropped and palettes are looked up as `convert("RGB")` does, which is what the
published pipelines feed the model. Three things differ from a bare `convert("RGB")`, each because
it gives a wrong picture: 16-bit grey is scaled to 8 bits (Pillow clips it to white), EXIF rotation
is applied, and premultiplied colours are divided by their alpha.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image

MAX_PIXELS = 178_956_970  # where Pillow itself refuses; a 108-megapixel telephone photo passes
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


class ImageError(ValueError):
    """An image that can not be used; the message names it and says what is wrong with it."""


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
            (H, W, 3) or (H, W, 4), or uint8 torch tensor (1 | 3 | 4, H, W). The first frame of
            an animation; the current one where a PIL image is given.
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
    name = name or _name(source)
    if isinstance(source, torch.Tensor):
        source = _tensor_to_array(source, name)
    if isinstance(source, np.ndarray):
        source = _array_to_image(source, name)
    _check_type(source, name)
    try:
        with _opened(source, name) as image:
            _check_size(image.size, name, max_pixels, max_aspect_ratio)
            if image.format in FORMATS_THAT_RUN_PROGRAMS:
                raise ImageError(f"{name}: {image.format} files are programs, not pictures")
            if draft_side is not None and image is not source:
                image.draft("RGB", (draft_side, draft_side))
            image.load()
            _check_size(image.size, name, max_pixels, max_aspect_ratio)  # icons choose on load
            return _upright(image, _to_rgb(image, name))
    except (FileNotFoundError, ImageError):
        raise
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        what = str(error) or type(error).__name__
        raise ImageError(f"{name}: not a readable image: {what}") from error


def _name(source: Any) -> str:
    if isinstance(source, str | os.PathLike):
        return os.fsdecode(source)
    inner = getattr(source, "filename", None) or getattr(source, "name", None)
    return inner if isinstance(inner, str) and inner else f"image given as {type(source).__name__}"


def _check_type(source: Any, name: str) -> None:
    known = Image.Image | str | os.PathLike | bytes | bytearray | memoryview
    if not isinstance(source, known) and not hasattr(source, "read"):
        raise TypeError(
            f"{name}: an image must be a PIL image, a path, bytes, a binary file, a numpy array "
            f"(H, W, 3) or a torch tensor (3, H, W); got {type(source).__name__}"
        )


def _opened(source: Any, name: str) -> AbstractContextManager[Image.Image]:
    """The image with its header read; a caller's own PIL image stays open."""
    if isinstance(source, Image.Image):
        return nullcontext(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return Image.open(BytesIO(source))
    if not isinstance(source, str | os.PathLike):
        return Image.open(source)
    if not os.path.exists(source):
        hint = "; download it first" if "://" in name else ""
        raise FileNotFoundError(f"{name}: no such image file{hint}")
    if not os.path.isfile(source):  # a named pipe would wait for ever, a device never end
        kind = "a directory" if os.path.isdir(source) else "not a regular file"
        raise ImageError(f"{name}: is {kind}")
    return Image.open(source)


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


def _upright(image: Image.Image, picture: Image.Image) -> Image.Image:
    """`picture` turned as the EXIF tag of `image` says, or as it is."""
    try:
        orientation = image.getexif().get(ORIENTATION)
    except Exception:  # noqa: BLE001  damaged EXIF raises nearly anything; the photo is readable
        orientation = None
    turn = UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return picture if turn is None else picture.transpose(turn)


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
