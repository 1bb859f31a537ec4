"""Images and texts together, as transformers' processors do it.

    processor = InternVLProcessor.from_pretrained(directory_or_hub_id)
    model(**processor(images=photos, text=["a red panda"]))       # similarities and embeddings
    model.encode_text(**processor(text=["a red panda"]))
    model.generate(**processor(images=photos, prompts=["English caption:"] * len(photos)))

Transformers' Auto classes serve what `save_pretrained` wrote, see auto.py.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import BatchFeature

from ..printable import printable
from .files import OURS, TOKENIZER, image_settings, processor_folder
from .images import Geometry, InternVLImageProcessor
from .padding import Padding
from .text import MAX_LENGTH, InternVLTokenizer

FILE_CLASS = "InternVL14BProcessor"  # the name by which AutoProcessor finds ours, see auto.py
IMAGE_FILE_CLASS = "InternVL14BImageProcessor"


class InternVLProcessor:
    """Prepares the model's inputs.

    Args:
        image_processor: for images.
        tokenizer: for texts and prompts.
    """

    model_input_names = ["pixel_values", "input_ids", "attention_mask"]

    def __init__(
        self, image_processor: InternVLImageProcessor, tokenizer: InternVLTokenizer
    ) -> None:
        self.image_processor = image_processor
        self.tokenizer = tokenizer

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        prompts: str | Sequence[str] | None = None,
        task: Literal["embedding", "prompt"] = "embedding",
        padding: Padding = "longest",
        truncation: bool = True,
        max_length: int | None = None,
        dtype: torch.dtype = torch.float32,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Model inputs for images, texts, or both.

        Args:
            images: one image or many, see InternVLImageProcessor.
            text: one text or several; what for, `task` says.
            prompts: the same as `text` with `task="prompt"`.
            task: "embedding" (prefix, `</s>`, padded right) or "prompt" (to be continued by
                `generate`: no `</s>`, padded left).
            padding: of embedding texts, see `InternVLTokenizer.encode_for_embedding`.
            truncation: False cuts no embedding text.
            max_length: the most ids in a row; None is 80 for embeddings, no limit for prompts.
            dtype: of pixel_values. The model does not cast: give it the dtype of its weights.
            return_tensors: "pt"; other kinds are refused.

        Returns:
            BatchFeature (a dict with `.to(device)`): pixel_values (B, 3, S, S) where there are
            images; input_ids and attention_mask (B, L) int64 where there are texts.

        Raises:
            ValueError: nothing to prepare, both `text` and `prompts`, an unknown task, or what
                the image processor and the tokenizer refuse.
        """
        if images is None and text is None and prompts is None:
            raise ValueError("InternVLProcessor: needs images, text or prompts")
        if text is not None and prompts is not None:
            raise ValueError("InternVLProcessor: text and prompts both make input_ids; give one")
        if task not in ("embedding", "prompt"):
            raise ValueError(
                f'InternVLProcessor: task must be "embedding" or "prompt", got {task!r}'
            )
        if return_tensors not in ("pt", None):
            raise ValueError(f'InternVLProcessor: gives "pt" tensors, not {return_tensors!r}')
        inputs: dict[str, Any] = {}
        if images is not None:
            inputs["pixel_values"] = self.image_processor(images, dtype=dtype)
        if task == "prompt" and prompts is None:
            prompts, text = text, None
        if prompts is not None:
            inputs.update(self.tokenizer.encode_prompt(prompts, max_length)._asdict())
        if text is not None:
            length = None if not truncation else max_length or MAX_LENGTH
            inputs.update(self.tokenizer.encode_for_embedding(text, length, padding)._asdict())
        return BatchFeature(inputs)

    def decode(self, ids: Sequence[int] | Tensor, skip_special_tokens: bool = True) -> str:
        """As `InternVLTokenizer.decode`."""
        return self.tokenizer.decode(ids, skip_special_tokens)

    def batch_decode(
        self, batch: Iterable[Sequence[int]] | Tensor, skip_special_tokens: bool = True
    ) -> list[str]:
        """As `InternVLTokenizer.batch_decode`."""
        return self.tokenizer.batch_decode(batch, skip_special_tokens)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        geometry: Geometry | None = None,
        size: int | None = None,
        **options: Any,
    ) -> "InternVLProcessor":
        """Reads a published directory or one that `save_pretrained` wrote.

        Args:
            source: directory, or hub id "owner/name".
            geometry: instead of the stored one. A published directory has "clip", or "retrieval"
                where it lacks preprocessor_config.json.
            size: side of the image instead of the stored one.
            options: `subfolder`, `revision`, `cache_dir`, `token`, `local_files_only`,
                `force_download`.

        Raises:
            FileNotFoundError: no such directory or repository, or no tokenizer.model in it.
            ValueError: a file there is damaged or asks for what is not supported.
        """
        folder = processor_folder(source, **options)
        tokenizer = folder / TOKENIZER
        if not tokenizer.is_file():
            raise FileNotFoundError(f"InternVLProcessor: {printable(source)} has no {TOKENIZER}")
        settings = image_settings(folder)
        chosen = {"geometry": geometry, "size": size}
        settings.update({key: value for key, value in chosen.items() if value is not None})
        try:
            image_processor = InternVLImageProcessor(**settings)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"InternVLProcessor: {printable(source)} has image settings "
                f"{printable(settings, 300)}: {error}"
            ) from error
        return cls(image_processor, InternVLTokenizer(tokenizer))

    def save_pretrained(self, directory: str | os.PathLike) -> list[str]:
        """Writes processor_config.json and tokenizer.model, and returns their paths."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {
            "processor_class": FILE_CLASS,
            "image_processor": {
                "image_processor_type": IMAGE_FILE_CLASS,
                **self.image_processor.to_dict(),
            },
        }
        (folder / OURS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        self.tokenizer.save(folder / TOKENIZER)
        return [str(folder / OURS), str(folder / TOKENIZER)]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(\n  {self.image_processor},\n  {self.tokenizer},\n)"
