"""What goes into the model and comes out of it: images, texts, and both together."""

from typing import TYPE_CHECKING, Any

from .captions import clean_caption, encode_for_training
from .decoding import load_image
from .images import InternVLImageProcessor
from .padding import (
    TokenBatch,
    check_right_padded,
    last_token_index,
    mask_from_ids,
    repad_left,
)
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
    "check_right_padded",
    "clean_caption",
    "encode_for_training",
    "last_token_index",
    "load_image",
    "mask_from_ids",
    "read_image_file",
    "repad_left",
]


def __getattr__(name: str) -> Any:
    if name == "InternVLProcessor":  # the only part that needs transformers, seconds to import
        from .processor import InternVLProcessor

        return InternVLProcessor
    raise AttributeError(f"module {__name__} has no attribute {name}")
