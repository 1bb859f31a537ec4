"""What goes into the model and comes out of it: images, texts, and both together."""

from typing import TYPE_CHECKING, Any

from .decoding import load_image
from .images import InternVLImageProcessor
from .padding import TokenBatch
from .sources import ImageError, read_image_file
from .special_tokens import SPECIAL_TOKENS, add_special_tokens
from .text import InternVLTokenizer
from .tiles import InternVLTileProcessor
from .video import video_frames

if TYPE_CHECKING:
    from .processor import InternVLProcessor
    from .vision_language import VisionLanguageProcessor

__all__ = [
    "SPECIAL_TOKENS",
    "ImageError",
    "InternVLImageProcessor",
    "InternVLProcessor",
    "InternVLTileProcessor",
    "InternVLTokenizer",
    "TokenBatch",
    "VisionLanguageProcessor",
    "add_special_tokens",
    "load_image",
    "read_image_file",
    "video_frames",
]


def __getattr__(name: str) -> Any:
    # The parts that need transformers, which takes seconds to import.
    if name == "InternVLProcessor":
        from .auto import InternVLProcessor

        return InternVLProcessor
    if name == "VisionLanguageProcessor":
        from .vision_language import VisionLanguageProcessor

        return VisionLanguageProcessor
    raise AttributeError(f"module {__name__} has no attribute {name}")
