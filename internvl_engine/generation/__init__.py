"""Generation: the KV cache, and the static decode engine.

cache.py     KVCache, which grows: for transformers' own `generate`
storage.py   the keys and values of a batch in one tensor that stays where it is
support.py   which models and calls the engine serves
step.py      one step of a model as a function of tensors, captured or recorded
loops.py     greedy decoding and sampling
beams.py     beam search
decode.py    the door: what transformers' `generate` calls in place of its own loops
batching.py  many prompts, of which a few are decoded at a time
"""

from .batching import admit, continue_many
from .cache import KVCache, KVCacheLayer
from .decode import decode, generate

__all__ = ["KVCache", "KVCacheLayer", "admit", "continue_many", "decode", "generate"]
