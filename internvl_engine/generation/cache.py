"""The KV cache of generation: one preallocated tensor, written in place.

Keys are stored rotated. Eager modules use the cache through transformers' `Cache.update`; fused
ones through `rotary_append`, which rotates and writes in one pass.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from .. import kernels


class KVCache(Cache):
    """A cache whose storage is (layers, 2, B, H, S, D), allocated once for `max_length` positions.

    Longer sequences grow it, by half, at the cost of a copy.

    Args:
        config: of QLLaMA, for the number of layers.
        max_length: positions to allocate for: queries, prompt and new tokens.
        disposable: whether the static engine may go on in this storage rather than in a copy; the
            cache is empty then.
    """

    def __init__(self, config: LlamaConfig, max_length: int, disposable: bool = False) -> None:
        if max_length < 1:
            raise ValueError(f"KVCache: max_length must be at least 1, got {max_length}")
        self.storage: Any = None  # a Tensor from the first update on
        self.max_length, self.disposable = max_length, disposable
        count = config.num_hidden_layers
        super().__init__(layers=[KVCacheLayer(self, index) for index in range(count)])

    def rotary_append(
        self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
        layer_idx: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Rotates q and k, appends k and v; see `kernels.rotary_append`.

        Args:
            q, k, v: (B, H, S, D). cos, sin: (P, D / 2). positions: (B, S) or (1, S).

        Returns:
            rotated q, and every key and value of the layer (B, H, T, D), views of the storage.
        """
        layer = self.layers[layer_idx]
        start = layer.length
        layer.reserve(k)
        slots = torch.arange(start, start + k.shape[2], dtype=torch.int64, device=k.device)
        k_cache, v_cache = self.storage[layer_idx]
        q = kernels.rotary_append(q, k, v, cos, sin, positions, slots, k_cache, v_cache)
        return q, layer.keys, layer.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes what row beam_idx[b] was."""
        if self.storage is not None:
            used = self.storage[..., : self._used(), :]
            used.copy_(used.index_select(2, beam_idx.to(used.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, next to each other."""
        if self.storage is not None:
            self._reallocate(self.storage.shape[2] * repeats, self.storage.shape[4], repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given rows."""
        if self.storage is not None:
            self.storage = self.storage[:, :, indices.to(self.storage.device)]

    def crop(self, max_length: int) -> None:
        """Keeps the first max_length positions; a negative number drops so many, and 0 none.

        transformers 5 calls it with what to drop, transformers 4 with what to keep.
        """
        for layer in self.layers:
            layer.crop(max_length)

    def reset(self) -> None:
        """Forgets every position and keeps the storage."""
        for layer in self.layers:
            layer.length = 0

    def _used(self) -> int:
        return max(layer.length for layer in self.layers)

    def _allocate(self, like: Tensor) -> None:
        batch, heads, positions, dim = like.shape
        length = max(self.max_length, positions)
        self._new_storage(like, batch, heads, length, dim)

    @torch.inference_mode(False)  # else it could not be written outside of inference mode
    def _new_storage(self, like: Tensor, *shape: int) -> None:
        self.storage = like.new_empty(len(self.layers), 2, *shape)

    def _reallocate(self, batch: int, length: int, repeats: int = 1) -> None:
        old, used = self.storage, self._used()
        self._new_storage(old, batch, old.shape[3], length, old.shape[5])
        rows = self.storage.unflatten(2, (-1, repeats))  # every old row goes to `repeats` new ones
        rows[..., :used, :] = old[..., :used, :].unsqueeze(3)


class KVCacheLayer(CacheLayerMixin):
    """One layer's part of a KVCache, as transformers' own caches have it."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, cache: KVCache, index: int) -> None:
        self.cache = cache
        self.index = index
        self.length = 0

    @property
    def is_initialized(self) -> bool:
        """Whether there is storage."""
        return self.cache.storage is not None

    @property
    def keys(self) -> Tensor:
        """(B, H, length, D), a view."""
        return self.cache.storage[self.index, 0, :, :, : self.length]

    @property
    def values(self) -> Tensor:
        """(B, H, length, D), a view."""
        return self.cache.storage[self.index, 1, :, :, : self.length]

    def reserve(self, states: Tensor) -> None:
        """Counts the positions of states (B, H, S, D) as used, with storage for them."""
        cache, needed = self.cache, self.length + states.shape[2]
        if cache.storage is None or (cache._used() == 0 and not self._fits(states)):
            cache._allocate(states)
        if not self._fits(states):
            _, _, rows, heads, _, dim = cache.storage.shape
            raise ValueError(
                f"KVCache: holds {rows} rows of {heads} heads of {dim}, {cache.storage.dtype} on "
                f"{cache.storage.device}, got {tuple(states.shape)}, {states.dtype} on "
                f"{states.device}"
            )
        if needed > cache.storage.shape[4]:
            cache._reallocate(cache.storage.shape[2], max(needed, cache.storage.shape[4] * 3 // 2))
        self.length = needed

    def _fits(self, states: Tensor) -> bool:
        storage = self.cache.storage
        of_one_kind = states.dtype == storage.dtype and states.device == storage.device
        return of_one_kind and (*states.shape[:2], states.shape[3]) == (
            *storage.shape[2:4],
            storage.shape[5],
        )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Allocates for a batch like key_states, (B, H, S, D)."""
        if self.cache.storage is None:
            self.cache._allocate(key_states)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends (B, H, S, D) states; returns all keys and values, views of the storage."""
        if value_states.shape != key_states.shape:
            raise ValueError(
                f"KVCache: keys and values must have one shape (B, H, S, D), got "
                f"{tuple(key_states.shape)} and {tuple(value_states.shape)}"
            )
        start = self.length
        self.reserve(key_states)
        self.keys[:, :, start:] = key_states
        self.values[:, :, start:] = value_states
        return self.keys, self.values

    def crop(self, max_length: int) -> None:
        """As KVCache.crop, this layer alone."""
        kept = max_length if max_length > 0 else self.length + max_length
        self.length = min(self.length, max(kept, 0))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As KVCache.reorder_cache, this layer alone."""
        if self.length > 0:
            for states in (self.keys, self.values):
                states.copy_(states.index_select(0, beam_idx.to(states.device)))

    def get_seq_length(self) -> int:
        """Positions held."""
        return self.length

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    get_max_cache_shape = get_max_length  # transformers 4

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """(keys after `query` more positions, 0); transformers 4 passes the positions."""
        new = query if isinstance(query, int) else query.shape[0]
        return self.length + new, 0
