"""Photos to the normalised tensor that InternViT reads.

RGB -> one of three geometries -> (value / 255 - mean) / std, (B, 3, S, S). Pillow only: its
bicubic resize with antialiasing is what the published scores were measured with, and the resize of
torchvision that transformers 5 uses differs by up to 1/255. The geometries, as SPEC calls them by
their use:

- "retrieval": straight to S x S, the aspect ratio is ignored. Retrieval and captions.
- "classification": short side to S, centre crop as torchvision rounds (half to even). ImageNet.
- "clip": the same with the crop rounded down, as transformers' CLIP processor. The published
  preprocessor_config.json; one pixel beside "classification" where the excess is odd.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .decoding import MAX_ASPECT_RATIO, load_image
from .sources import BYTES, MAX_PIXELS, ImageError

Geometry = Literal["retrieval", "classification", "clip"]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class InternVLImageProcessor:
    """Images in, pixel values out.

    Args:
        size: side S of the square that the model sees.
        geometry: how a photo becomes that square, see the head of this file.
        mean: of the three channels, on a scale of 0..1.
        std: standard deviations of the three channels, on the same scale.
        max_pixels: larger images are refused, see `load_image`.
        max_aspect_ratio: longer images are refused, see `load_image`.
        draft: decode JPEGs at reduced size, faster and not pixel-exact.

    Raises:
        ValueError: a size below 1, an unknown geometry, or not three channels.
    """

    def __init__(
        self,
        size: int = 224,
        geometry: Geometry = "retrieval",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        *,
        max_pixels: int = MAX_PIXELS,
        max_aspect_ratio: float = MAX_ASPECT_RATIO,
        draft: bool = False,
    ) -> None:
        name = "InternVLImageProcessor"
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name}: size must be a whole number of 1 or more, got {size!r}")
        if geometry not in get_args(Geometry):
            raise ValueError(
                f"{name}: geometry must be one of {get_args(Geometry)}, got {geometry!r}"
            )
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                f"{name}: needs three means and three positive deviations, got {mean} and {std}"
            )
        self.size, self.geometry, self.draft = size, geometry, draft
        self.mean = tuple(float(m) for m in mean)
        self.std = tuple(float(s) for s in std)
        self.max_pixels, self.max_aspect_ratio = max_pixels, max_aspect_ratio

    def __call__(
        self,
        images: Any,
        *,
        dtype: torch.dtype = torch.float32,
        workers: int = 1,
        first: int = 0,
    ) -> Tensor:
        """Pixel values of one image or many.

        Args:
            images: anything `load_image` opens, or a list or other iterable of it; numpy
                (B, H, W, 3) and torch (B, 3, H, W) count as B images. No images give B = 0.
            dtype: of the result; the arithmetic is float32.
            workers: threads that decode and resize (Pillow releases the interpreter lock).
            first: the number of the first image in errors, where this is a part of a longer list.

        Returns:
            (B, 3, S, S) on the CPU.

        Raises:
            FileNotFoundError: no such file; the message has the number of the image.
            ImageError: an image that cannot be used, by number and name.
            TypeError: not an image in any of its forms.
        """
        return self.pixel_values(images, dtype=dtype, workers=workers, first=first)

    def pixel_values(
        self,
        images: Any,
        *,
        dtype: torch.dtype = torch.float32,
        workers: int = 1,
        first: int = 0,
    ) -> Tensor:
        """The same, also where a subclass returns it in a mapping."""
        squares = self.squares(images, workers=workers, first=first)
        return normalized(squares, self.mean, self.std).to(dtype)

    def transform(self, image: Any) -> Tensor:
        """Pixel values (3, S, S) of one image, float32: what a data loader applies to its items.

        With `processor.tokenizer` and a model this is the triple of `open_clip` and
        CLIP_benchmark: `return model, processor.image_processor.transform, processor.tokenizer`.
        """
        return self.pixel_values([image])[0]

    def squares(self, images: Any, *, workers: int = 1, first: int = 0) -> Tensor:
        """The (B, S, S, 3) uint8 pixels that `__call__` normalises; arguments as there."""
        sources = enumerate([images] if is_one_image(images) else images, first)
        if workers > 1:
            with ThreadPoolExecutor(workers) as pool:
                arrays = list(pool.map(self._square, sources))
        else:
            arrays = [self._square(source) for source in sources]
        if not arrays:
            return torch.empty(0, self.size, self.size, 3, dtype=torch.uint8, device="cpu")
        return torch.from_numpy(np.stack(arrays))

    def video(self, frames: Any, num_frames: int | None = None, **options: Any) -> Tensor:
        """Pixel values of a video's frames, which the model encodes one by one and averages.

        Args:
            frames: the frames in order, each as in `__call__`.
            num_frames: take this many, each the middle of an equal part; None takes all.
            options: `dtype` and `workers` of `__call__`.

        Returns:
            (F, 3, S, S).

        Raises:
            ValueError: no frames, or fewer than `num_frames` asks for.
        """
        frames = list(frames)
        wanted = len(frames) if num_frames is None else num_frames
        if not 1 <= wanted <= len(frames):
            raise ValueError(
                f"InternVLImageProcessor.video: {wanted} frames wanted of {len(frames)}; "
                "needs at least one, and no more than there are"
            )
        middles = [(2 * i + 1) * len(frames) // (2 * wanted) for i in range(wanted)]
        return self.pixel_values([frames[i] for i in middles], **options)

    def to_images(self, pixel_values: Tensor) -> list[Image.Image]:
        """Undoes the normalisation, for contact sheets and for looking at what the model sees.

        Args:
            pixel_values: (B, 3, H, W) or (3, H, W), floating point, normalised.

        Returns:
            B RGB images; float32 values from `__call__` give back exactly its pixels.
        """
        values = pixel_values[None] if pixel_values.ndim == 3 else pixel_values
        if values.ndim != 4 or values.shape[1] != 3 or not values.is_floating_point():
            raise ValueError(
                "InternVLImageProcessor.to_images: needs normalised values (B, 3, H, W), got "
                f"{pixel_values.dtype} {tuple(pixel_values.shape)}"
            )
        values = values.detach().float().cpu() * _channels(self.std) + _channels(self.mean)
        pixels = values.mul(255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(np.ascontiguousarray(p)) for p in pixels]

    def to_dict(self) -> dict[str, Any]:
        """Everything `__init__` takes, ready for JSON."""
        return dict(vars(self))

    def __repr__(self) -> str:
        standard = {
            name: p.default for name, p in signature(InternVLImageProcessor).parameters.items()
        }
        changed = {
            k: v for k, v in self.to_dict().items() if k in ("size", "geometry") or v != standard[k]
        }
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in changed.items())})"

    def _square(self, source: tuple[int, Any]) -> np.ndarray:
        """(S, S, 3) uint8 of one numbered image."""
        index, image = source
        try:
            picture = load_image(
                image,
                max_pixels=self.max_pixels,
                max_aspect_ratio=self.max_aspect_ratio,
                draft_side=2 * self.size if self.draft else None,
            )
        except (ImageError, FileNotFoundError, TypeError) as error:
            raise type(error)(f"image {index}: {error}") from error
        return np.asarray(fit(picture, self.size, self.geometry))


def normalized(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(value / 255 - mean) / std of (B, S, S, 3) uint8 pixels, as (B, 3, S, S) float32."""
    planes = pixels.permute(0, 3, 1, 2)
    values = torch.empty(planes.shape, dtype=torch.float32, device="cpu").copy_(planes).div_(255)
    return values.sub_(_channels(mean)).div_(_channels(std))


def fit(image: Image.Image, size: int, geometry: Geometry) -> Image.Image:
    """An image as a square of `size`, bicubic, by one of the three geometries.

    Args:
        image: 8-bit image.
        size: side of the result.
        geometry: see the head of this file.
    """
    width, height = image.size
    if geometry == "retrieval":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    short = min(width, height)
    # int() of the float quotient: torchvision and transformers both round the long side down so
    width, height = (size if n == short else int(size * n / short) for n in (width, height))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    if geometry == "classification":
        left, top = round((width - size) / 2), round((height - size) / 2)
    else:
        left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def is_one_image(images: Any) -> bool:
    """Whether this is a single image in one of its forms, and not several."""
    if isinstance(images, np.ndarray) and images.dtype.kind in "OSU":  # of pictures, or paths
        return images.ndim == 0
    if isinstance(images, Tensor | np.ndarray):
        return images.ndim < 4
    return (
        hasattr(images, "read")
        or not isinstance(images, Iterable)
        or isinstance(images, Image.Image | Mapping | str | BYTES)
    )


def _channels(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu").view(3, 1, 1)
