"""Captions, tokens a second: the static engine beside transformers' `generate`.

Rows have read the image's queries and a prompt; what is timed is their next tokens, and the time to
the first one by itself.

    ours, ...           the static engine on the accelerated model, of every form of its weights
    ours, generate      `generate` on the accelerated model with wide weights, and our cache
    eager               `generate` on the eager model

Python and dispatch, which the engine leaves out, weigh most where the model is small.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from internvl_engine.generation import KVCache, decode

from .cases import Case, Provider

BATCHES = (1, 8, 32)
NEW_TOKENS = 16
PROMPT = 7  # "English caption:" and its BOS are as many


def cases(
    forms: Any, batches: tuple[int, ...] = BATCHES, new: int = NEW_TOKENS, tokens: int = 257
) -> Iterator[Case]:
    """Decoding and the first token, by batch.

    Args:
        forms: the eager model as `eager`, and accelerated ones by name as `models`, the first with
            wide weights (model.Forms).
        batches: captions at a time.
        new: tokens of each caption.
        tokens: of an image.
    """
    for rows in batches:
        inputs = _inputs(forms.eager, rows, tokens)
        yield _case(forms, "decode", inputs, new, read=True)
        yield _case(forms, "first_token", inputs, 1, read=False)


def _inputs(model: Any, rows: int, tokens: int) -> dict[str, Tensor]:
    """Vision features and prompts as `generate` takes them."""
    weight = model.query_tokens
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.qllama_config.vocab_size, (rows, PROMPT),
                        generator=generator)  # fmt: skip
    features = torch.randn(
        rows, tokens, model.config.vision_config.hidden_size, generator=generator
    )
    ids = ids.to(weight.device)
    return {
        "visual_features": features.to(weight.device, weight.dtype),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }


def _case(forms: Any, operator: str, inputs: dict[str, Tensor], new: int, read: bool) -> Case:
    rows = len(inputs["input_ids"])
    engine = {"custom_generate": decode}
    wide, exact = next(iter(forms.models)), forms.eager.dtype == torch.float32
    providers = {
        # Near a tie, another rounding takes another id.
        name: Provider(_run(model, inputs, new, read, engine), same=exact and name == wide)
        for name, model in forms.models.items()
    }
    without = _run(forms.models[wide], inputs, new, read, {})
    providers["ours, generate"] = Provider(without, same=exact)
    providers["eager"] = Provider(_run(forms.eager, inputs, new, read, {}))
    weights = sum(p.nbytes for p in forms.eager.language_model.parameters())
    label = f"{rows} caption{'s' * (rows > 1)}, {new} token{'s' * (new > 1)} each"
    shape, dtype = tuple(inputs["input_ids"].shape), forms.eager.dtype
    counts: dict[str, Any] = {"tokens": rows * new, "varies": ("captions", rows)}
    return Case(operator, label, shape, dtype, providers, new * weights, **counts)


def _run(
    model: Any, inputs: dict[str, Tensor], new: int, read: bool, how: dict[str, Any]
) -> Callable[[], Tensor]:
    """Captions of `new` tokens behind a prompt that, with `read`, is in the cache but for its last
    id."""
    config = model.config
    length = config.num_query_token + PROMPT
    generate = partial(
        model.generate, **inputs, eos_token_id=None, pad_token_id=0, do_sample=False, **how
    )
    cache = KVCache(config.qllama_config, length + new)
    if read:
        with torch.inference_mode():
            generate(max_new_tokens=1, past_key_values=cache)

    @torch.inference_mode()
    def run() -> Tensor:
        if read:
            cache.crop(length - 1)
        else:
            cache.reset()
        return generate(max_new_tokens=new, past_key_values=cache)

    return run
