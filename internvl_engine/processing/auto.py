"""The processors under transformers' Auto classes, and as its pipelines call them.

The Auto classes find a class by the name of the configuration, and transformers keeps the names
"InternVLConfig" and "InternVLProcessor" for another architecture: without an entry of ours they
would take that one's image processor and tokenizer, silently. Files carry the names of the
subclasses below.
"""

import os
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from ..configuration import InternVLConfig, VisionLanguageConfig
from .files import TOKENIZER, image_settings, processor_folder, stored_settings
from .images import InternVLImageProcessor
from .processor import IMAGE_FILE_CLASS, InternVLProcessor
from .text import InternVLTokenizer
from .vision_language import VisionLanguageProcessor


class InternVL14BProcessor(InternVLProcessor):
    """InternVLProcessor under the name that AutoProcessor can tell from transformers' own."""


class InternVL14BImageProcessor(InternVLImageProcessor, BaseImageProcessor):
    """InternVLImageProcessor as transformers' image processors are called: for a mapping."""

    model_input_names = ["pixel_values"]

    def __call__(  # type: ignore[override]
        self,
        images: Any,
        *,
        dtype: torch.dtype = torch.float32,
        return_tensors: str | None = "pt",
        **options: Any,
    ) -> BatchFeature:
        """BatchFeature with pixel_values (B, 3, S, S); other arguments as its base class has."""
        if return_tensors not in ("pt", None):
            raise ValueError(f'{IMAGE_FILE_CLASS}: gives "pt" tensors, not {return_tensors!r}')
        return BatchFeature({"pixel_values": self.pixel_values(images, dtype=dtype, **options)})

    preprocess = __call__

    def to_dict(self) -> dict[str, Any]:
        """The settings, with the name of this class, by which AutoImageProcessor finds it."""
        return {"image_processor_type": IMAGE_FILE_CLASS, **InternVLImageProcessor.to_dict(self)}

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **options: Any) -> Any:  # type: ignore[override]
        """Reads the settings of the images where `InternVLProcessor.from_pretrained` does."""
        return cls(**image_settings(processor_folder(source, **options)))

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **options: Any) -> Any:
        """From what a file holds; transformers 4 reads the file itself."""
        processor = cls(**stored_settings(image_processor_dict, "the settings"))
        return (processor, options) if options.pop("return_unused_kwargs", False) else processor


class InternVL14BTokenizer(InternVLTokenizer):
    """InternVLTokenizer from a directory or hub id."""

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **options: Any) -> "InternVL14BTokenizer":
        """Reads tokenizer.model; options as `InternVLProcessor.from_pretrained`."""
        return cls(Path(processor_folder(source, **options)) / TOKENIZER)


AutoProcessor.register(InternVLConfig, InternVL14BProcessor, exist_ok=True)
AutoProcessor.register(VisionLanguageConfig, VisionLanguageProcessor, exist_ok=True)
_asked = signature(AutoImageProcessor.register).parameters
if "image_processor_classes" in _asked:
    # `register` itself would import the namesake's classes, and keep them for other backends.
    backends = dict.fromkeys(("pil", "torchvision"), InternVL14BImageProcessor)
    IMAGE_PROCESSOR_MAPPING.register(InternVLConfig, backends, exist_ok=True)
else:
    _old = "slow_image_processor_class"  # in transformers 4, under another name in 4.37
    _old = _old if _old in _asked else "image_processor_class"
    AutoImageProcessor.register(InternVLConfig, **{_old: InternVL14BImageProcessor}, exist_ok=True)
AutoTokenizer.register(InternVLConfig, slow_tokenizer_class=InternVL14BTokenizer, exist_ok=True)
