"""A model with its processor: embeddings of images and texts, in batches, the same in any grouping.

B images, T texts, E = 768 width of the embeddings
"""

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .. import kernels
from ..processing.text import EMBEDDING_PREFIX, MAX_LENGTH
from .batches import Outcome
from .captured import CapturedEncode
from .fingerprint import fingerprint
from .images import each_image, encode_image, not_finite
from .passes import Upload
from .texts import embed_rows

if TYPE_CHECKING:
    from ..modeling.internvl import InternVLModel
    from ..processing import InternVLProcessor

Mode = Literal["c", "g"]
KEPT = 16  # classifiers of each engine, the oldest makes room
PROVIDES = {  # what each choice of `parts` can do
    "all": {"C embeddings of images", "G embeddings of images", "embeddings of texts", "captions"},
    "c": {"C embeddings of images", "embeddings of texts"},
    "g": {"C embeddings of images", "G embeddings of images", "embeddings of texts"},
    "image": {"C embeddings of images"},
    "text": {"embeddings of texts"},
    "caption": {"captions"},
}


class Embedder:
    """What every task needs of a model.

    It runs under `torch.inference_mode`; what it returns are ordinary tensors without gradients. It
    may be used by several threads. A process forked after its first use hangs, as with PyTorch
    itself: start processes with "spawn", which copies the engine. The text embeddings of the last
    lists of labels are `remembered` for as long as the weights stay what they are.

    Args:
        model: an InternVLModel, InternVL_C or InternVL_G.
        processor: an InternVLProcessor of the same checkpoint.
        name: what to call the model in messages and indexes.
        parts: which parts of the model are there: "all", "c", "g", "image", "text" or "caption";
            None is what it says itself where it was loaded in parts, else all.

    Raises:
        ValueError: there are no such parts.
    """

    def __init__(
        self,
        model: "InternVLModel",
        processor: "InternVLProcessor",
        *,
        name: str = "",
        parts: str | None = None,
    ) -> None:
        parts = parts or getattr(model.config, "parts", None) or "all"
        if parts not in PROVIDES:
            raise ValueError(f"parts must be one of {', '.join(PROVIDES)}, got {parts!r}")
        self.model, self.processor = model.eval(), processor
        self.name = name or type(model).__name__
        self.parts = parts
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.remembered: dict[Hashable, Tensor] = {}
        self._prepare()

    def _prepare(self) -> None:
        """What serves this object in this process: no copy of the engine takes it along."""
        self.captured, self.upload = CapturedEncode(self.model), Upload()

    def __getstate__(self) -> dict[str, Any]:
        return {n: v for n, v in vars(self).items() if n not in ("captured", "upload")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._prepare()

    def remember(self, key: Hashable, value: Tensor) -> None:
        """Keeps what was computed of texts under a key that says all that it depends on."""
        latest = list(self.remembered.items())[1 - KEPT :]
        self.remembered = {**dict(latest), key: value}  # replaced whole: other threads may read

    @property
    def fingerprint(self) -> dict[str, str]:
        """Which weights the model has now, part by part; see `embedding.fingerprint`."""
        return fingerprint(self.model)

    @property
    def device(self) -> torch.device:
        """Where inputs go; the hooks of a model that is spread out move them on."""
        device = next(self.model.parameters()).device
        return self.model.placement.main if device.type == "meta" else device

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def require(self, ability: str) -> None:
        """Raises ValueError where this engine was loaded without the parts that `ability` needs."""
        if ability not in PROVIDES[self.parts]:
            able = [parts for parts, abilities in PROVIDES.items() if ability in abilities]
            raise ValueError(
                f"InternVL: {self.name} was loaded with parts={self.parts!r}, which gives no "
                f"{ability}; load it with parts={' or '.join(map(repr, able))}"
            )

    def encode_image(
        self,
        images: Any = None,
        mode: Literal["c", "g", "both"] = "c",
        *,
        pixel_values: Tensor | None = None,
        batch_size: int | None = None,
        normalize: bool = True,
        progress: Callable[[int], object] | None = None,
    ) -> Any:
        """Embeds images, in one vision pass whatever the mode.

        Args:
            images: one image, or any number in a list, generator, array (B, H, W, 3) ...; each a
                PIL image, path, bytes or array, see `processing.load_image`. Generators are read as
                they are needed.
            mode: "c" (pooled vision features), "g" (with the queries' reading of them), or "both".
            pixel_values: (B, 3, S, S) in place of images: floating point, normalised already.
            batch_size: images at a time; None is what free memory allows. It is halved for the rest
                of the call where memory runs out.
            normalize: unit length; otherwise as the model gives them.
            progress: called with the number of images after every batch.

        Returns:
            (B, E) float32 on the model's device, or ImageEmbeddings of two for "both". One image
            gives B = 1.

        Raises:
            ValueError: unknown mode, parts that were not loaded, an image that cannot be used or
                whose embedding is not finite.
        """
        self.check_mode(mode)
        return encode_image(self, images, pixel_values, mode, batch_size, normalize, progress)

    def each_image(
        self,
        images: Any,
        mode: Literal["c", "g", "both"] = "c",
        *,
        batch_size: int | None = None,
        normalize: bool = True,
    ) -> Iterator[Outcome]:
        """Embeds images one after another, and goes on where one cannot be used.

        Args:
            images, mode, batch_size, normalize: as `encode_image`.

        Yields:
            For every image, in order, (number, value, error): its embedding (E,), or
            ImageEmbeddings of two for "both"; or why there is none.
        """
        self.check_mode(mode)
        return each_image(self, images, mode, batch_size, normalize)

    def check_mode(self, mode: str) -> int:
        """How many embeddings a mode gives for an image; ValueError where it is none, or cannot."""
        if mode not in ("c", "g", "both"):
            raise ValueError(f'encode_image: mode must be "c", "g" or "both", got {mode!r}')
        for kind in "cg" if mode == "both" else mode:
            self.require(f"{kind.upper()} embeddings of images")
        return 2 if mode == "both" else 1

    @torch.inference_mode()
    def embed_pixels(self, pixels: Tensor, mode: str) -> Tensor:
        """C, or G, or both: (1 or 2, B, E) float32 on the engine's device; not normalised."""
        if len(pixels) > 1 and kernels.is_batch_invariant():  # PyTorch's own products are not
            rows = [self.embed_pixels(row, mode) for row in pixels.split(1)]
            return torch.cat(rows, dim=1)
        pixels = self.upload(pixels, self.device, self.dtype)
        return self.captured(pixels, mode).to(self.device)

    def release(self) -> None:
        """Gives back memory that is kept for speed."""
        self.captured.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def encode_text(
        self,
        texts: str | Iterable[str],
        *,
        max_tokens: int = 8192,
        normalize: bool = True,
        max_length: int = MAX_LENGTH,
        prefix: str = EMBEDDING_PREFIX,
    ) -> Tensor:
        """Embeds texts; each different one is run once, and with others of its length.

        The model is causal, so padding changes nothing and is left out where it can be, and the ids
        that many texts begin with are run once: results are those of texts padded to 80.

        Args:
            texts: one text, or several.
            max_tokens: ids, with padding, that are run at a time.
            normalize: unit length; otherwise as the model gives them.
            max_length: the most ids of a text; longer ones are cut, as in training.
            prefix: put before every text.

        Returns:
            (T, E) float32 on the model's device, in the order of the texts. One text gives T = 1.

        Raises:
            ValueError: parts that were not loaded, or a text whose embedding is not finite.
        """
        self.require("embeddings of texts")
        texts = [texts] if isinstance(texts, str) else list(texts)
        tokenizer = self.processor.tokenizer
        given = tokenizer.encode_for_embedding(texts, max_length, False, prefix=prefix).input_ids
        rows = list(dict.fromkeys(map(tuple, given)))
        number = {row: index for index, row in enumerate(rows)}
        order = torch.tensor([number[tuple(row)] for row in given], dtype=torch.long, device="cpu")
        found = self._embed_rows(rows, max_tokens, normalize)[order.to(self.device)]
        if not bool(found.isfinite().all()):
            wrong = int(found.isfinite().all(-1).logical_not().nonzero()[0])
            raise ValueError(f"encode_text: text {wrong}, {texts[wrong]!r:.60}: {not_finite(self)}")
        return found

    @torch.inference_mode()
    def _embed_rows(self, rows: list[tuple[int, ...]], max_tokens: int, normalize: bool) -> Tensor:
        """(T, E) float32 of rows of ids."""
        from ..modeling.internvl import unit

        invariant = kernels.is_batch_invariant()  # then one whole row at a time
        found = embed_rows(
            self.model, rows, 1 if invariant else max_tokens, self.device, shares=not invariant
        )
        return unit(found) if normalize else found
