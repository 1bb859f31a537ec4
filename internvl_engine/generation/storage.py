"""The keys and values of a batch in one tensor, which a step writes to and reads in place.

Rows are packed: row b holds its tokens in slots 0 to n_b - 1, whatever its prompt was padded with,
so the position of a token is its slot, the length of a row is the position of its last token plus
one, and attention reads what a row holds and no more. Keys are stored rotated, so where one lies
changes nothing.

    B rows, H heads, S slots, T positions of a prompt, D head size
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .. import kernels
from .cache import KVCache

BLOCK = 64  # slots by which a storage grows at least


class Storage:
    """(layers, 2, B, H, S, D), zeros where nothing was written: masks hide no NaN.

    Args:
        like: keys of one layer, (any, H, any, D).
        layers: how many there are.
        rows: B.
        slots: S.
    """

    def __init__(self, like: Tensor, layers: int, rows: int, slots: int) -> None:
        _, heads, _, dim = like.shape
        self.tensor = like.new_zeros((layers, 2, rows, heads, slots, dim))

    @classmethod
    def out_of(cls, cache: KVCache) -> "Storage":
        """The storage of a disposable cache, which is empty then; what it held is still there."""
        own = cls.__new__(cls)
        own.tensor, length = cache.storage, cache.get_seq_length()
        own.tensor[..., length:, :].zero_()
        cache.storage = None
        cache.reset()
        return own

    @property
    def slots(self) -> int:
        """S."""
        return self.tensor.shape[4]

    def load(self, cache: Cache, mask: Tensor | None, rows: Tensor | None = None) -> None:
        """Takes over what a cache holds, without its padding.

        Args:
            cache: of T positions; its layers have `keys` and `values`.
            mask: (b, T), 0 where a position is padding; None where there is none.
            rows: (b,), where the rows of the cache go; None is to all, in order.
        """
        order: Any = None
        if mask is not None:
            order = _real_first(mask.to(self.tensor.device))
        for layer, own in zip(cache.layers, self.tensor, strict=True):
            for states, to in zip((layer.keys, layer.values), own, strict=True):
                if order is not None:
                    states = states.gather(2, order.expand_as(states))
                to = to[:, :, : states.shape[2]]
                if rows is None:
                    to.copy_(states)
                else:
                    to.index_copy_(0, rows, states.to(to.dtype))

    def pack(self, mask: Tensor) -> None:
        """Moves the tokens of every row to its first slots, in place; mask as in `load`."""
        order: Any = _real_first(mask.to(self.tensor.device))
        for layer in self.tensor:
            for states in layer[:, :, :, : mask.shape[1]]:
                states.copy_(states.gather(2, order.expand_as(states)))

    def grow(self, slots: int) -> None:
        """Moves everything to another storage of so many slots."""
        old = self.tensor
        self.tensor = old.new_zeros((*old.shape[:4], slots, old.shape[5]))
        self.tensor[..., : old.shape[4], :] = old

    def reorder(self, rows: Tensor, start: int, end: int) -> None:
        """Row b becomes what row rows[b] was, in slots from start to end: the others are alike."""
        part = self.tensor[..., start:end, :]
        part.copy_(part.index_select(2, rows.to(part.device)))


def _real_first(mask: Tensor) -> Tensor:
    """Places (B, 1, T, 1) of the tokens of each row, in their order, then of its padding."""
    return (mask == 0).to(torch.uint8).argsort(dim=1, stable=True)[:, None, :, None]


class StaticCache(Cache):
    """A storage as the cache of one step: row b writes slot positions[b].

    It is made for one call of a model, of tensors only: nothing in it counts. Nothing in it refers
    back to it either, so that the storage goes with the last who holds it.

    Args:
        storage: (layers, 2, B, H, S, D).
        positions: (B,) int64, of the new tokens.
    """

    is_static = True

    def __init__(self, storage: Tensor, positions: Tensor) -> None:
        self.slots, self.lengths = positions[:, None], positions + 1
        layers = [StaticCacheLayer(keys, values, self.slots) for keys, values in storage]
        super().__init__(layers=layers)

    def rotary_append(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
        layer_idx: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Rotates q and k and writes k and v; see `KVCache.rotary_append`.

        Returns:
            rotated q, and the keys and values of the layer, (B, H, S, D), all slots of them.
        """
        keys, values = self.layers[layer_idx].keys, self.layers[layer_idx].values
        q = kernels.rotary_append(q, k, v, cos, sin, positions, self.slots, keys, values)
        return q, keys, values


class StaticCacheLayer(CacheLayerMixin):
    """One layer's part of a StaticCache: keys and values (B, H, S, D), slots (B, 1)."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    is_initialized = True

    def __init__(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        self.keys, self.values, self.slots = keys, values, slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Nothing: there is storage."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes (B, H, 1, D) states to the slots of the step; returns all slots."""
        slots = self.slots[:, :, None, None].expand_as(key_states)
        # Under autocast the rotated keys are wider than the values; the storage holds either.
        self.keys.scatter_(2, slots, key_states.to(self.keys.dtype))
        self.values.scatter_(2, slots, value_states.to(self.values.dtype))
        return self.keys, self.values

    def get_seq_length(self, *args: Any) -> int:
        """S - 1, as if the step's token were the last of a full cache."""
        return self.keys.shape[2] - 1

    def get_max_length(self) -> int:
        """S."""
        return self.keys.shape[2]

    get_max_cache_shape = get_max_length  # transformers 4

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """(S, 0)."""
        return self.keys.shape[2], 0
