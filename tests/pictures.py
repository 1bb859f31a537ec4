"""Pictures for the tests: seeded noise, files in memory, exact comparison."""

import io

import numpy as np
from PIL import Image


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def same(image: Image.Image, expected: np.ndarray) -> bool:
    return image.mode == "RGB" and np.array_equal(np.asarray(image), expected)
