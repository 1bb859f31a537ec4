"""What goes into the model and comes out of it: images, texts, and both together."""

from typing import TYPE_CHECKING, Any

from .decoding import load_image
from .images import InternVLImageProcessor
from .padding import TokenBatch
from .sources import ImageError, read_image_file
from .text import InternVLTokenizer

if TYPE_CHECKING:
    from .processor import InternVLProcessor

__all__ = [
    "ImageError",
    "InternVLImageProcessor",
    "InternVLProcessor",
    "InternVLTokenizer",
    "TokenBatch",
    "load_image",
    "read_image_file",
]


def __getattr__(name: str) -> Any:
    if name == "InternVLProcessor":  # the only part that needs transformers, seconds to import
        from .auto import InternVLProcessor

        return InternVLProcessor
    raise AttributeError(f"module {__name__} has no attribute {name}")
