"""Photos to the tiles that a chat model reads: a grid of squares by aspect ratio, and a thumbnail.

RGB -> the grid (columns, rows) whose shape is nearest to the photo's -> bicubic resize to
(columns S, rows S) -> cut row by row into S x S tiles -> the whole photo at S x S as the last tile,
where there is more than one -> (value / 255 - mean) / std. With S = 448 and at most 12 tiles a
4:3 photo becomes 4 x 3 tiles and a thumbnail: 13 tiles, 3,328 tokens.

    n tiles of an image, T tiles of all images, S side of a tile
"""

import operator
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .decoding import MAX_ASPECT_RATIO, load_image
from .images import IMAGENET_MEAN, IMAGENET_STD, is_one_image, normalized
from .sources import MAX_PIXELS, ImageError

MOST_TILES = 1024  # of one image: 262,144 tokens at 448 pixels, beyond any context


class InternVLTileProcessor:
    """Images in; tiles, or the pixel values of them, out.

    Args:
        size: side S of a tile.
        dynamic: cut images into tiles; False resizes each to a single tile.
        min_tiles: the fewest tiles of a grid.
        max_tiles: the most tiles of a grid, the thumbnail not counted.
        use_thumbnail: add the whole image as the last tile of a grid of several.
        pad2square: pad an image that becomes a single tile to a square, in the mean colour.
        mean: of the three channels, on a scale of 0..1.
        std: standard deviations of the three channels, on the same scale.
        max_pixels: larger images are refused, see `load_image`.
        max_aspect_ratio: longer images are refused, see `load_image`.

    Raises:
        ValueError: a size or number of tiles below 1, more tiles at least than at most, or not
            three channels.
    """

    def __init__(
        self,
        size: int = 448,
        *,
        dynamic: bool = True,
        min_tiles: int = 1,
        max_tiles: int = 12,
        use_thumbnail: bool = True,
        pad2square: bool = False,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        max_pixels: int = MAX_PIXELS,
        max_aspect_ratio: float = MAX_ASPECT_RATIO,
    ) -> None:
        name = type(self).__name__
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name}: size must be a whole number of 1 or more, got {size!r}")
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                f"{name}: needs three means and three positive deviations, got {mean} and {std}"
            )
        self.size, self.dynamic = size, bool(dynamic)
        self.max_tiles = checked_tiles(max_tiles, "max_tiles")
        self.min_tiles = checked_tiles(min_tiles, "min_tiles")
        if self.min_tiles > self.max_tiles:
            raise ValueError(f"{name}: min_tiles {min_tiles} is more than max_tiles {max_tiles}")
        self.use_thumbnail, self.pad2square = bool(use_thumbnail), bool(pad2square)
        self.mean = tuple(float(m) for m in mean)
        self.std = tuple(float(s) for s in std)
        self.max_pixels, self.max_aspect_ratio = max_pixels, max_aspect_ratio

    def __call__(
        self,
        images: Any,
        *,
        max_tiles: int | None = None,
        dtype: torch.dtype = torch.float32,
        workers: int = 1,
    ) -> tuple[Tensor, list[int]]:
        """Pixel values of one image or many.

        Args:
            images: anything `load_image` opens, or a list or other iterable of it.
            max_tiles: of each image, in place of the processor's own.
            dtype: of the result; the arithmetic is float32.
            workers: threads that decode and resize.

        Returns:
            (T, 3, S, S) on the CPU, the tiles of all images in order; and how many each has.

        Raises:
            FileNotFoundError: no such file; the message has the number of the image.
            ImageError: an image that cannot be used, by number and name.
            TypeError: not an image in any of its forms.
            ValueError: a number of tiles below 1.
        """
        found = self.tiles(images, max_tiles=max_tiles, workers=workers)
        return self.pixel_values(found, dtype=dtype), [len(tiles) for tiles in found]

    def tiles(
        self, images: Any, *, max_tiles: int | None = None, workers: int = 1, first: int = 0
    ) -> list[Tensor]:
        """The tiles (n, S, S, 3) uint8 of each image; arguments as `__call__` has them.

        Args:
            first: the number of the first image in errors, where this is a part of a longer list.
        """
        most = self.max_tiles if max_tiles is None else checked_tiles(max_tiles, "max_tiles")
        sources = enumerate([images] if is_one_image(images) else images, first)

        def cut(source: tuple[int, Any]) -> Tensor:
            return self._tiles(self._opened(*source), most)

        if workers > 1:
            with ThreadPoolExecutor(workers) as pool:
                return list(pool.map(cut, sources))
        return [cut(source) for source in sources]

    def frames(self, frames: Any, *, workers: int = 1) -> list[Tensor]:
        """The frames of a video, each a single tile (1, S, S, 3) uint8."""
        return self.tiles(frames, max_tiles=1, workers=workers)

    def pixel_values(
        self, tiles: Sequence[Tensor], *, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Normalised (T, 3, S, S) of the tiles (n, S, S, 3) uint8 of several images."""
        empty = torch.empty(0, self.size, self.size, 3, dtype=torch.uint8, device="cpu")
        return normalized(torch.cat([empty, *tiles]), self.mean, self.std).to(dtype)

    def to_dict(self) -> dict[str, Any]:
        """Everything `__init__` takes, ready for JSON."""
        return dict(vars(self))

    def __repr__(self) -> str:
        tiles = f"{self.min_tiles} to {self.max_tiles} tiles" if self.dynamic else "one tile"
        thumbnail = ", thumbnail" if self.dynamic and self.use_thumbnail else ""
        return f"{type(self).__name__}({self.size} pixels, {tiles}{thumbnail})"

    def _opened(self, number: int, image: Any) -> Image.Image:
        try:
            return load_image(
                image, max_pixels=self.max_pixels, max_aspect_ratio=self.max_aspect_ratio
            )
        except (ImageError, FileNotFoundError, TypeError) as error:
            raise type(error)(f"image {number}: {error}") from error

    def _tiles(self, image: Image.Image, most: int) -> Tensor:
        size, bicubic = self.size, Image.Resampling.BICUBIC
        if not self.dynamic:
            if self.pad2square:
                image = padded_to_square(image, self.mean)
            return _stacked([image.resize((size, size), bicubic)])
        least = min(self.min_tiles, most)
        columns, rows = choose_grid(*image.size, least, most, size)
        resized = image.resize((columns * size, rows * size), bicubic)
        corners = [(c * size, r * size) for r in range(rows) for c in range(columns)]
        tiles = [resized.crop((x, y, x + size, y + size)) for x, y in corners]
        if self.use_thumbnail and len(tiles) > 1:
            tiles.append(image.resize((size, size), bicubic))
        return _stacked(tiles)


def choose_grid(
    width: int, height: int, min_tiles: int, max_tiles: int, size: int
) -> tuple[int, int]:
    """The grid (columns, rows) for an image.

    The nearest aspect ratio wins. Of two that are equally near, the larger grid does where the
    image has more than half of its pixels.

    Args:
        width: of the image.
        height: of the image.
        min_tiles: the fewest tiles.
        max_tiles: the most tiles.
        size: side of a tile.
    """
    ratio, area = width / height, width * height
    best, least = (1, 1), float("inf")
    for columns, rows in grids(min_tiles, max_tiles):
        distance = abs(ratio - columns / rows)
        large_enough = area > 0.5 * size * size * columns * rows
        if distance < least or (distance == least and large_enough):
            best, least = (columns, rows), distance
    return best


@lru_cache(maxsize=64)
def grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) of min_tiles to max_tiles, by the number of tiles.

    Grids of the same number come in the order in which a Python set of them is gone through, as in
    the published code. With min_tiles of 2 or more that order decides between two of them.
    """
    found = set()
    for side in range(min_tiles, max_tiles + 1):
        sides = range(1, min(side, max_tiles) + 1)
        for columns in sides:
            for rows in sides[: max_tiles // columns]:
                if columns * rows >= min_tiles:
                    found.add((columns, rows))
    return tuple(sorted(found, key=lambda grid: grid[0] * grid[1]))


def padded_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """An RGB image in the middle of a square of the mean colour."""
    width, height = image.size
    side = max(width, height)
    colour = tuple(int(255 * value) for value in mean)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def checked_tiles(tiles: Any, name: str) -> int:
    """A number of tiles; raises ValueError where it is none of 1 to MOST_TILES."""
    try:
        count = operator.index(tiles)
    except TypeError:
        count = 0
    if isinstance(tiles, bool) or not 1 <= count <= MOST_TILES:
        raise ValueError(f"{name} must be a whole number of 1 to {MOST_TILES}, got {tiles!r}")
    return count


def _stacked(images: Sequence[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))
