"""The pass over images as one function of tensors, and its captures.

    C     pooler1(vision)
    G     unit(pooler2(queries)) + unit(pooler1(vision))

On a GPU the launches of a pass are recorded once for every mode, size of images and number of
images (see capture.py) and replayed from then on: one image is bound by them otherwise. Numbers of
images are rounded up to buckets, so that a service that sees them all keeps a few graphs, and a
shape is captured when it comes the second time: most of those that come once never come again.

    B images of S x S pixels, E width of the embeddings
"""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..capture import Captured, weights_of
from .fingerprint import ADAPTERS

if TYPE_CHECKING:
    from ..modeling.internvl import InternVLModel

GRAPHS = 16  # of each mode
SEEN = 64  # shapes that are remembered to have come once


def embed_pixels(model: "InternVLModel", mode: str, pixels: Tensor) -> Tensor:
    """Embeddings of pixel values (B, 3, S, S): C, G, or for "both" the two of one pass.

    Returns:
        (1 or 2, B, E) float32 on the device of the last pooler; not normalised.
    """
    if mode == "c":
        found = [model.clip_projector(model.vision_model(pixel_values=pixels)[0])]
    else:
        states, queries = model.get_image_features(pixels)
        c = model.clip_projector(states)
        g = model.g_embedding(c, queries)
        found = [c, g] if mode == "both" else [g]
    return torch.stack(found).float()


def bucket(count: int) -> int:
    """The number of images that a graph for `count` takes: 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
    power = 1 << max(count - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power


class CapturedEncode:
    """`embed_pixels` of a model, captured where that serves. Threads take turns.

    Args:
        model: whose weights may change: graphs of weights that are elsewhere now are dropped.
        replay: capture on the CPU too, as recordings.
    """

    def __init__(self, model: "InternVLModel", *, replay: bool = False) -> None:
        self.model, self.replay = model, replay
        self.captures = {
            mode: Captured(partial(embed_pixels, model, mode), GRAPHS, replay=replay)
            for mode in ("c", "g", "both")
        }
        self.seen: OrderedDict[Hashable, None] = OrderedDict()
        self.lock = threading.Lock()
        self.copied: Any = None  # an event

    def __call__(self, pixels: Tensor, mode: str) -> Tensor:
        """Embeddings (1 or 2, B, E) of pixels on the model's device; nobody else's memory."""
        serves = (pixels.is_cuda or self.replay) and len(pixels) > 0
        state = self._state(mode) if serves else None
        if state is None:
            return embed_pixels(self.model, mode, pixels)
        key = mode, bucket(len(pixels)), pixels.shape[1:], pixels.dtype, *_circumstances(pixels)
        with self.lock:
            self.captures[mode].keep(state)
            if key not in self.seen:
                self.seen[key] = None
                if len(self.seen) > SEEN:
                    self.seen.popitem(last=False)
                return embed_pixels(self.model, mode, pixels)
            self.seen.move_to_end(key)
            missing = key[1] - len(pixels)
            if missing:  # rows of zeros, which change no other row
                pixels = torch.cat((pixels, pixels.new_zeros(missing, *pixels.shape[1:])))
            self._wait(pixels)
            found = self.captures[mode](pixels, key=key)
            found = found[:, : found.shape[1] - missing].clone()  # the next run overwrites it
            self._mark(pixels)
            return found

    def _wait(self, pixels: Tensor) -> None:
        """Before a run: until the results of the last are copied, on whichever stream that is."""
        if self.copied is not None:
            torch.cuda.current_stream(pixels.device).wait_event(self.copied)

    def _mark(self, pixels: Tensor) -> None:
        if pixels.is_cuda:
            self.copied = torch.cuda.current_stream(pixels.device).record_event()

    def clear(self) -> None:
        """Gives back the memory of all captures."""
        with self.lock:
            for captured in self.captures.values():
                captured.clear()
            self.seen.clear()

    def _state(self, mode: str) -> Hashable:
        """What a graph of a mode reads: weights, switches of adapters, and the rotary tables, which
        may be grown anew. None where somebody looks on, or moves what goes through: hooks."""
        model = self.model
        parts: list[nn.Module] = (
            [model.vision_model, model.clip_projector] if mode == "c" else [model]
        )
        switches = []
        for each in (module for part in parts for module in part.modules()):
            if each._forward_hooks or each._forward_pre_hooks or "forward" in each.__dict__:
                return None
            if hasattr(type(each), "merged_adapters"):  # a layer of peft
                switches.append(str([getattr(each, name, None) for name in ADAPTERS]))
        tables = {} if mode == "c" else model.language_model.model.rotary_emb._tables
        addresses = [(key, *(t.data_ptr() for t in pair)) for key, pair in tables.items()]
        return *map(weights_of, parts), *switches, *addresses


def _circumstances(pixels: Tensor) -> tuple[Any, ...]:
    """What else decides which kernels a pass launches."""
    device = pixels.device.type
    chosen = tuple(by.get(device.upper()) for by in kernels.implementations().values())
    return torch.is_autocast_enabled(device), kernels.is_batch_invariant(), chosen
