"""The façade: one object that embeds, compares, classifies, describes and finds images.

    engine = InternVL.from_pretrained("OpenGVLab/InternVL-14B-224px")
    engine.classify("photo.jpg", ["cat", "dog"])
    engine.caption(["one.jpg", "two.jpg"])
    engine.index("photos/"); engine.search("a red panda")

Each task is a file of tasks/, opened at its first use.

    B images, T texts
"""

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .memory import memory
from .tasks.embedder import Embedder, Mode

if TYPE_CHECKING:
    from .modeling.internvl import InternVLModel
    from .processing import InternVLProcessor
    from .tasks.classify import Prediction
    from .tasks.index import FolderIndex, Hit

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "subfolder")


class InternVL(Embedder):
    """InternVL-14B with its processor: `encode_image` and `encode_text`, and every task.

    Args:
        model: an InternVLModel, InternVL_C or InternVL_G.
        processor: an InternVLProcessor of the same checkpoint.
        name: what to call the model in messages and indexes.
        parts: which parts of the model are there, see `from_pretrained`.
        accelerate: swap eager modules for fused ones; `report` tells which.
    """

    def __init__(
        self,
        model: "InternVLModel",
        processor: "InternVLProcessor",
        *,
        name: str = "",
        parts: str | None = None,
        accelerate: bool = True,
    ) -> None:
        super().__init__(model, processor, name=name, parts=parts)
        self.report = _accelerated(model) if accelerate else None
        self.last_index: FolderIndex | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        parts: str | None = None,
        accelerate: bool = True,
        processor: "InternVLProcessor | None" = None,
        **options: Any,
    ) -> "InternVL":
        """Loads a checkpoint with its processor.

        Args:
            source: a directory, a weight file, or a hub id "owner/name".
            dtype: of the weights; "auto" is bfloat16 where the device computes in it, else float32.
            device: None is the GPU where there is one, else the CPU.
            parts: what to read and hold: "all", "c" or "g" (embeddings of images and texts),
                "image" or "text" (one tower), "caption"; None is what the checkpoint has.
            accelerate: swap eager modules for fused ones.
            processor: in place of the one beside the weights.
            options: further ones of `InternVLModel.from_pretrained`: device_map, revision ...

        Raises:
            FileNotFoundError, ValueError: no checkpoint there, or a damaged one; the message names
                file and weight.
        """
        from .modeling.internvl import InternVLModel
        from .processing import InternVLProcessor

        folder = Path(source)
        if processor is None:
            place = folder.parent if folder.is_file() else source
            hub = {name: options[name] for name in HUB_OPTIONS if name in options}
            processor = InternVLProcessor.from_pretrained(place, **hub)
        if device is None and options.get("device_map") is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = InternVLModel.from_pretrained(
            source, dtype=dtype, device=device, parts=parts, **options
        )
        name = str(folder.resolve()) if folder.exists() else os.fspath(source)
        return cls(model, processor, name=name, accelerate=accelerate)

    @classmethod
    def nano(cls, **options: Any) -> "InternVL":
        """The embedded model, trained on handwritten digits in coloured ink; works offline."""
        from .assets import nano_directory

        engine = cls.from_pretrained(nano_directory(), **{"dtype": torch.float32, **options})
        engine.name = "nano"
        return engine

    def similarity(self, images: Any, texts: str | Iterable[str], mode: Mode = "c") -> Tensor:
        """Cosines (B, T) of images and texts."""
        return self.encode_image(images, mode) @ self.encode_text(texts).t()

    def logits(self, images: Any, texts: str | Iterable[str], mode: Mode = "c") -> Tensor:
        """Similarities (B, T) times exp(logit_scale): softmax over T is the published example's."""
        scale = self.model.logit_scale.detach().float().exp().to(self.device)
        return scale * self.similarity(images, texts, mode)

    def classify(
        self,
        images: Any,
        labels: Sequence[str],
        *,
        templates: Sequence[str] | None = None,
        mode: Mode = "c",
        top_k: int | None = None,
        batch_size: int = 32,
    ) -> "list[list[Prediction]]":
        """Zero-shot classification; see `tasks.classify.classify`."""
        from .tasks.classify import classify

        return classify(self, images, labels, templates, mode, top_k, batch_size)

    def caption(self, images: Any, prompt: Any = None, **options: Any) -> Any:
        """Describes images; see `tasks.caption.caption`."""
        from .tasks.caption import caption

        return caption(self, images, prompt, **options)

    def answer(self, images: Any, questions: Any, **options: Any) -> Any:
        """Answers questions about images; see `tasks.caption.answer`."""
        from .tasks.caption import answer

        return answer(self, images, questions, **options)

    def index(
        self, folder: str | os.PathLike, output: str | os.PathLike | None = None, **options: Any
    ) -> "FolderIndex":
        """Embeds the images of a folder, once, and keeps them on disk; see `tasks.index`."""
        from .tasks.index import FolderIndex

        self.last_index = FolderIndex.build(self, Path(folder), output, **options)
        return self.last_index

    def search(
        self, query: Any, k: int = 10, index: "FolderIndex | str | os.PathLike | None" = None
    ) -> "list[Hit]":
        """The k images of an index that are nearest to a text or an image.

        Args:
            query: a text; or an image that is not a string (a Path, a PIL image, an array); or an
                embedding (E,).
            k: how many.
            index: a FolderIndex, or the folder of one; None is the last that `index` made.
        """
        from .tasks.index import FolderIndex

        if index is not None and not isinstance(index, FolderIndex):
            index = FolderIndex.open(index)
        index = index or self.last_index
        if index is None:
            raise ValueError("InternVL.search: there is no index yet; make one with index(folder)")
        return index.search(self, query, k)

    def __repr__(self) -> str:
        return f"InternVL({self.name}, parts={self.parts!r}, {self.dtype}, {self.device})"


def _accelerated(model: "InternVLModel") -> Any:
    """Swaps in the fused modules and returns the report; None where memory does not suffice."""
    from .acceleration import accelerate

    weights = sum(
        parameter.numel() * parameter.element_size()
        for parameter in model.parameters()
        if parameter.device.type == "cpu"
    )
    available = memory()["available"]
    if weights > available:
        # On the CPU fused weights are packed, which takes memory; mapped ones stay in their file.
        warnings.warn(
            f"InternVL: {weights / 1e9:.1f} GB of weights stay mapped and eager, because only "
            f"{available / 1e9:.1f} GB of memory are available; parts= loads less",
            stacklevel=4,
        )
        return None
    return accelerate(model)
