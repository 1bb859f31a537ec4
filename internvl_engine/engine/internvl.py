"""The façade: one object that embeds, compares, classifies, describes and finds images.

    engine = InternVL.from_pretrained("OpenGVLab/InternVL-14B-224px")
    engine.classify("photo.jpg", ["cat", "dog"])
    engine.caption(["one.jpg", "two.jpg"])
    engine.index("photos/"); engine.search("a red panda")

What it does with single images says tasks/methods.py.

    B images, T texts
"""

import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..embedding import Mode
from ..tasks.methods import Tasks
from .weights import accelerated, passed_as_bytes

if TYPE_CHECKING:
    from ..index import FolderIndex, Hit
    from ..modeling.internvl import InternVLModel
    from ..processing import InternVLProcessor
    from ..schemes import Scheme


class InternVL(Tasks):
    """InternVL-14B with its processor: `encode_image` and `encode_text`, and every task.

    Everything runs under `torch.inference_mode`, and what comes back are ordinary tensors without
    gradients. An engine may be used by several threads. A process that is forked after the first
    use hangs, as with PyTorch itself: `multiprocessing.get_context("spawn")` passes the engine on.

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
        self.report = accelerated(model, self.parts, "InternVL") if accelerate else None
        self.last_index: FolderIndex | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike,
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        parts: str | None = None,
        quantize: "str | Scheme | None" = None,
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
            quantize: "int8", "int4" or "fp8": hold the large weights in that form; they are
                quantized one at a time while they are read. A checkpoint that `internvl convert
                --quantize` wrote needs no word: it is mapped as it is, in seconds.
            accelerate: swap eager modules for fused ones.
            processor: in place of the one beside the weights.
            options: further ones of `InternVLModel.from_pretrained`: device_map, revision ...

        Raises:
            FileNotFoundError, ValueError: no checkpoint there, one of another kind, or a damaged
                one; the message names file and weight.
        """
        from ..checkpoint import check_takes, hub_options
        from ..modeling.internvl import InternVLModel
        from ..processing import InternVLProcessor

        folder, given = Path(source), processor
        check_takes(folder if folder.exists() else os.fspath(source), InternVLModel, **options)
        if processor is None:
            place = folder.parent if folder.is_file() else source
            processor = InternVLProcessor.from_pretrained(place, **hub_options(options))
        if device is None and options.get("device_map") is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = InternVLModel.from_pretrained(
            source, dtype=dtype, device=device, parts=parts, quantize=quantize, **options
        )
        if given is None:  # force_image_size, or a position table of another size
            processor.image_processor.size = model.config.image_size
        name = str(folder.resolve()) if folder.exists() else os.fspath(source)
        return cls(model, processor, name=name, accelerate=accelerate)

    @classmethod
    def nano(cls, **options: Any) -> "InternVL":
        """The embedded model, trained on handwritten digits in coloured ink; works offline."""
        from ..assets import nano_directory

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

    def index(
        self,
        folder: str | os.PathLike,
        output: str | os.PathLike | None = None,
        *,
        mode: Mode = "c",
        recursive: bool = True,
        extensions: Collection[str] | None = None,
        batch_size: int = 32,
        shard_size: int = 512,
        progress: Callable[[int, int], object] | None = None,
    ) -> "FolderIndex":
        """Embeds the images of a folder, once, and keeps them on disk for `search`.

        Run again, it embeds what is new and drops what is gone.

        Args:
            folder: its images, sorted; names that begin with a dot are left out.
            output: folder of the index, which holds one folder; None is `.internvl_index` in it.
            mode: "c" or "g".
            recursive: also the folders in it (links to folders are not followed).
            extensions: endings of the names, as "png"; None is `index.folder.EXTENSIONS`.
            batch_size: images at a time.
            shard_size: images between two writes, which come every 30 seconds at the latest.
            progress: called with (files done, files in all).

        Returns:
            The index; its `report` tells what was added, unchanged, removed, kept and broken.

        Raises:
            NotADirectoryError: there is no such folder.
            ValueError: the index there was made by another model (or this one before training), in
                another mode or of another folder; or the model gives no finite embeddings.
            BlockingIOError: another process is writing it.
        """
        from ..index import FolderIndex
        from ..index.folder import EXTENSIONS

        self.last_index = FolderIndex.build(
            self, folder, output, mode=mode, recursive=recursive,
            extensions=EXTENSIONS if extensions is None else extensions, batch_size=batch_size,
            shard_size=shard_size, progress=progress,
        )  # fmt: skip
        return self.last_index

    def search(
        self, query: Any, k: int = 10, index: "FolderIndex | str | os.PathLike | None" = None
    ) -> "list[Hit]":
        """The k images of an index that are nearest to a text or an image.

        Args:
            query: a text; or an image that is not a string (a Path, a PIL image, an array); or an
                embedding (E,), as tensor, array or numbers.
            k: how many.
            index: a FolderIndex, or the folder of one; None is the last that `index` made.

        Returns:
            Hits of path, score and name, the nearest first.

        Raises:
            FileNotFoundError: there is no such index.
            ValueError: k is below 1, the query is not one text, image or embedding, or the index is
                of another model (or of this one before training).
        """
        from ..index import FolderIndex

        if index is not None and not isinstance(index, FolderIndex):
            index = FolderIndex.open(index)
        index = self.last_index if index is None else index
        if index is None:
            raise ValueError("InternVL.search: there is no index yet; make one with index(folder)")
        return index.search(self, query, k)

    def __repr__(self) -> str:
        return f"InternVL({self.name}, parts={self.parts!r}, {self.dtype}, {self.device})"


passed_as_bytes(InternVL)
