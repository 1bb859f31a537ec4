"""The door of the static engine: what transformers' `generate` calls in place of its own loops.

    model.generate(..., custom_generate=decode)

`generate` makes of its arguments what it always makes of them: a resolved configuration, the
processors and criteria of every field in it, inputs repeated for beams. The prompt is read by the
model's own forward and its own cache; from then on the rows are the engine's. What the engine does
not serve goes on to the loop that transformers would have called.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from .beams import beam_search
from .loops import Rules, sample
from .step import CACHES, start
from .support import (
    goes_elsewhere,
    has_counted_positions,
    unsupported_cache,
    unsupported_call,
    unsupported_model,
)


def generate(run: Callable[..., Any], **options: Any) -> Any:
    """Calls a `generate` of ours or of transformers with the static engine, where that serves it.

    Args:
        run: `generate` of an InternVLModel, a VisionLanguageModel or a language model.
        options: its arguments.
    """
    if goes_elsewhere(getattr(run, "__self__", None), options):
        return run(**options)
    # `generate` does not hand its streamer on to a callable.
    loop = partial(decode, streamer=options.get("streamer"))
    return run(**options, custom_generate=loop)


def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Continues prompts; the arguments and the result of transformers' `_sample`.

    Ids are those of transformers' own loops, token for token, where the logits are: a static cache
    and packed rows sum in another order.
    """
    rules = Rules(logits_processor, stopping_criteria, generation_config, streamer)
    found = read_prompts(model, input_ids, rules, model_kwargs)
    if found is None:
        return transformers_loop(model, input_ids, rules, model_kwargs)
    rows = start(model, found.cache, found.mask, found.most, captures=rules.steps(input_ids) > 3)
    found = found._replace(cache=None)  # its keys and values are the rows' now
    loop = beam_search if generation_config.num_beams > 1 else sample
    return loop(rows, input_ids, found.logits, rules)


class Prompts(NamedTuple):
    """Prompts that were read, and nothing decoded yet.

    ids: (B, L), what processors and criteria see of them. logits: (B, V), of the next tokens.
    cache: of T positions. mask: (B, T), 0 where a position is padding, or None where none is.
    most: positions that a row may come to need.
    """

    ids: Tensor
    logits: Tensor
    cache: Any
    mask: Tensor | None
    most: int


def read_prompts(
    model: Any, input_ids: Tensor, rules: Rules, model_kwargs: dict[str, Any]
) -> Prompts | None:
    """Reads prompts as transformers' loops do; None where the engine does not serve the call."""
    given = _cache_in(model_kwargs)
    past = 0 if given is None else given.get_seq_length()
    new = rules.steps(input_ids)
    most = max(input_ids.shape[1], _length(model_kwargs), past) + new
    if unsupported_call(rules.config) or unsupported_model(model, most):
        return None
    if given is not None and unsupported_cache(given, past):
        return None
    positions, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
    if not has_counted_positions(model, positions, mask):
        return None
    logits, cache, mask = _prefill(model, input_ids, rules.config, model_kwargs)
    reason = unsupported_cache(cache, cache.get_seq_length())
    assert reason is None, reason
    return Prompts(input_ids, logits, cache, mask, cache.get_seq_length() + new)


def _prefill(
    model: Any, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> tuple[Tensor, Any, Tensor | None]:
    if hasattr(model, "_prefill"):  # transformers 5
        outputs = model._prefill(input_ids, config, model_kwargs)
    else:
        length = input_ids.shape[1]
        model_kwargs = model._get_initial_cache_position(length, input_ids.device, model_kwargs)
        inputs = model.prepare_inputs_for_generation(input_ids, **model_kwargs)
        outputs = model(**inputs, return_dict=True)
    cache = _cache_in(outputs)
    mask = model_kwargs.get("attention_mask")
    if mask is not None and bool((mask != 0).all()):
        mask = None
    return outputs.logits[:, -1], cache, mask


def transformers_loop(
    model: Any, input_ids: Tensor, rules: Rules, model_kwargs: dict[str, Any]
) -> Any:
    """The loop that `generate` would have called."""
    beams = rules.config.num_beams > 1
    options = {} if beams else {"streamer": rules.streamer}
    loop = model._beam_search if beams else model._sample
    return loop(
        input_ids,
        logits_processor=rules.processors,
        stopping_criteria=rules.criteria,
        generation_config=rules.config,
        **options,
        **model_kwargs,
    )


def _cache_in(values: Any) -> Any:
    return next((values[name] for name in CACHES if values.get(name) is not None), None)


def _length(model_kwargs: dict[str, Any]) -> int:
    """Positions of a prompt that came as embeddings."""
    embeds = model_kwargs.get("inputs_embeds")
    return 0 if embeds is None else embeds.shape[1]
