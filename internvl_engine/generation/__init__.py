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

from transformers.utils.versions import require_version

require_version("transformers>=4.57", "KVCache is built of its cache layers")
from .batching import admit, continue_many  # noqa: E402
from .cache import KVCache, KVCacheLayer  # noqa: E402
from .decode import decode, generate  # noqa: E402

__all__ = ["KVCache", "KVCacheLayer", "admit", "continue_many", "decode", "generate"]
