"""A model with its processor: embeddings of images and texts, in batches, the same in any grouping.

B images, T texts, E = 768 width of the embeddings
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..processing.text import EMBEDDING_PREFIX, MAX_LENGTH
from .batches import image_batches, padded, text_batches
from .fingerprint import fingerprint

if TYPE_CHECKING:
    from ..modeling.internvl import InternVLModel
    from ..processing import InternVLProcessor

Mode = Literal["c", "g"]
PROVIDES = {  # what each choice of `parts` can do
    "all": {"C embeddings of images", "G embeddings of images", "embeddings of texts", "captions"},
    "c": {"C embeddings of images", "embeddings of texts"},
    "g": {"C embeddings of images", "G embeddings of images", "embeddings of texts"},
    "image": {"C embeddings of images"},
    "text": {"embeddings of texts"},
    "caption": {"captions"},
}


class ImageEmbeddings(NamedTuple):
    """C and G embeddings of the same B images, (B, E) each."""

    c: Tensor
    g: Tensor


class Embedder:
    """What every task needs of a model.

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
        # Before any acceleration, which may hold weights in other forms than parameters.
        self.fingerprint = fingerprint(model)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())

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

    @torch.no_grad()
    def encode_image(
        self,
        images: Any,
        mode: Literal["c", "g", "both"] = "c",
        *,
        batch_size: int = 32,
        normalize: bool = True,
        progress: Callable[[int], object] | None = None,
    ) -> Any:
        """Embeds images, in one vision pass whatever the mode.

        Args:
            images: one image, or any number in a list, generator, array (B, H, W, 3) ...; each a
                PIL image, path, bytes or array, see `processing.load_image`. Generators are read as
                they are needed.
            mode: "c" (pooled vision features), "g" (with the queries' reading of them), or "both".
            batch_size: images at a time.
            normalize: unit length; otherwise as the model gives them.
            progress: called with the number of images after every batch.

        Returns:
            (B, E) float32 on the model's device, or ImageEmbeddings of two for "both".

        Raises:
            ValueError: unknown mode, parts that were not loaded, an image that can not be used.
        """
        if mode not in ("c", "g", "both"):
            raise ValueError(f'encode_image: mode must be "c", "g" or "both", got {mode!r}')
        for kind in "cg" if mode == "both" else mode:
            self.require(f"{kind.upper()} embeddings of images")
        width = self.model.config.clip_embed_dim
        kinds = 2 if mode == "both" else 1
        batches = [torch.empty(kinds, 0, width, device=self.device)]
        pixels = image_batches(self.processor.image_processor, images, batch_size, self.dtype)
        for batch in pixels:
            embeddings = self._embed_pixels(batch.to(self.device), mode)
            batches.append(unit(embeddings) if normalize else embeddings)
            if progress is not None:
                progress(len(batch))
        embeddings = torch.cat(batches, dim=1)
        return ImageEmbeddings(*embeddings) if mode == "both" else embeddings[0]

    def _embed_pixels(self, pixels: Tensor, mode: str) -> Tensor:
        """C, or G, or both: (1 or 2, B, E) float32 on the engine's device."""
        if mode == "c":
            states = self.model.vision_model(pixel_values=pixels).last_hidden_state
            found = [self.model.clip_projector(states)]
        else:
            states, queries = self.model.get_image_features(pixels)
            c = self.model.clip_projector(states)
            g = unit(self.model.clip_projector2(queries)) + unit(c)
            found = [c, g] if mode == "both" else [g]
        return torch.stack(found).float().to(self.device)

    @torch.no_grad()
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

        The model is causal, so padding changes nothing and is left out where it can be: results
        are those of texts padded to 80.

        Args:
            texts: one text, or several.
            max_tokens: ids, with padding, that are run at a time.
            normalize: unit length; otherwise as the model gives them.
            max_length: the most ids of a text; longer ones are cut, as in training.
            prefix: put before every text.

        Returns:
            (T, E) float32 on the model's device, in the order of the texts.
        """
        self.require("embeddings of texts")
        texts = [texts] if isinstance(texts, str) else list(texts)
        tokenizer = self.processor.tokenizer
        given = tokenizer.encode_for_embedding(texts, max_length, False, prefix=prefix).input_ids
        rows = list(dict.fromkeys(map(tuple, given)))
        found = torch.empty(len(rows), self.model.config.clip_embed_dim, device=self.device)
        for batch in text_batches(rows, max_tokens):
            ids, mask = (t.to(self.device) for t in padded([rows[index] for index in batch]))
            found[torch.tensor(batch, device=self.device)] = (
                self.model.encode_text(ids, attention_mask=mask).float().to(self.device)
            )
        number = {row: index for index, row in enumerate(rows)}
        order = torch.tensor([number[tuple(row)] for row in given], dtype=torch.long)
        found = found[order.to(self.device)]
        return unit(found) if normalize else found


def unit(embeddings: Tensor) -> Tensor:
    """Rows (B, E) of length one; without an epsilon, as published."""
    return embeddings / embeddings.norm(dim=-1, keepdim=True)
