"""What `VisionLanguageModel.generate` hands to transformers.

Prompts come as embeddings, since their images are no tokens; then transformers returns new tokens
only, as the published code does, and its logits processors see nothing else. Ways to decode that
look at the ids of the prompt (prompt lookup, an assistant) get them, with a cache that has read the
embeddings. Beams start from copies of such a cache, where each would else read the prompt itself.

    B prompts of L tokens
"""

import copy
import functools
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from .masks import count_positions
from .placeholders import check_prompts
from .prompting import align_left, copies_asked
from .rotary import has_dynamic_rotary

# Whose caches hold keys and values of every token and nothing else. By name: their files take time
# to import.
_PLAIN_CACHES = frozenset({
    "LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
})  # fmt: skip


def continue_prompts(
    model: Any,
    images: tuple[Tensor | None, Tensor | None, Tensor | None],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    generation_config: GenerationConfig | None,
    options: dict[str, Any],
) -> Any:
    """New tokens; arguments and results as `VisionLanguageModel.generate`.

    Args:
        images: pixel_values, visual_features and image_flags.
    """
    pixel_values, visual_features, flags = images
    check_prompts(input_ids, None)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"generate: attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, "
            f"got {tuple(mask.shape)}"
        )
    mask = mask.to(input_ids.device)
    if options.get("past_key_values") is None:
        input_ids, mask = align_left(input_ids, mask)
        if has_dynamic_rotary(model.language_model):
            # Padding of every row: it would count for the prompt's base, and not for later ones'.
            start = mask.shape[1] - max(int(mask.bool().sum(1).max()), 1)
            input_ids, mask = input_ids[:, start:], mask[:, start:]
    embeds = model.embed(pixel_values, input_ids, flags, visual_features=visual_features)
    mask = mask.to(embeds.device)
    options = {"generation_config": generation_config, "attention_mask": mask, **options}
    language = getattr(model.language_model, "get_base_model", lambda: model.language_model)()
    if _reads_ids(generation_config, options):
        if (input_ids[:, -1] == model.img_context_token_id).any():
            raise ValueError(
                "generate: prompt lookup and assistants need prompts that end with text, got one "
                "that ends with a placeholder"
            )
        return _with_ids(language, embeds, input_ids.to(embeds.device), mask, options)
    copies = copies_asked(generation_config, options)
    if copies > 1 and _can_copy(language, embeds.shape[1], generation_config, options):
        cache = _read(language, embeds, mask, None)
        cache.batch_repeat_interleave(copies)
        options["past_key_values"] = cache
    # transformers 4 would make these on the device of the weights: meta, where they are offloaded.
    none_yet = torch.empty((len(embeds), 0), dtype=torch.int64, device=embeds.device)
    return model.language_model.generate(none_yet, inputs_embeds=embeds, **options)


def _can_copy(
    language: Any, length: int, config: GenerationConfig | None, options: dict[str, Any]
) -> bool:
    """Whether beams may start from copies of a cache that read the prompt once."""
    name = "cache_implementation"
    asked = (options.get(name), getattr(config, name, None))
    return (
        not any((*asked, getattr(language.generation_config, name, None)))
        and options.get("past_key_values") is None
        and options.get("use_cache") is not False
        and length > 1
        and _is_whole(language, length)
        and type(language).__name__ in _PLAIN_CACHES
    )


def _is_whole(language: Any, length: int) -> bool:
    """Whether a cache holds all of that many tokens, with no window that forgets the first."""
    window = getattr(language.config, "sliding_window", None)
    return window is None or length < window


def _read(language: Any, embeds: Tensor, mask: Tensor, cache: Any) -> Any:
    """A cache that has read a prompt but for its last token.

    Rotary embeddings may depend on the length, so all of it is read, and the last token forgotten.
    A cache of sliding windows that has forgotten the first tokens cannot do that.
    """
    past = 0 if cache is None else cache.get_seq_length()
    length = embeds.shape[1]
    end = length if _is_whole(language, length) else length - 1
    cache = language(
        inputs_embeds=embeds[:, past:end],
        attention_mask=mask[:, :end],
        position_ids=count_positions(mask)[:, past:end],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).past_key_values
    if end == length:
        cache.crop(-1)
    return cache


def _reads_ids(config: GenerationConfig | None, options: dict[str, Any]) -> bool:
    name = "prompt_lookup_num_tokens"
    lookup = options.get(name) or getattr(config, name, None)
    return bool(lookup) or options.get("assistant_model") is not None


def _with_ids(
    language: Any, embeds: Tensor, ids: Tensor, mask: Tensor, options: dict[str, Any]
) -> Any:
    """The prompt but for its last token is read here; transformers goes on with ids and cache."""
    cache = _read(language, embeds, mask, options.pop("past_key_values", None))
    length = ids.shape[1]
    if (assistant := options.get("assistant_model")) is not None:
        options["assistant_model"] = getattr(assistant, "language_model", assistant)
    if (streamer := options.get("streamer")) is not None:
        options["streamer"] = _WithoutPrompt(streamer)
    result = _continuing(language).generate(
        input_ids=ids, past_key_values=cache, **{"use_cache": True, **options}
    )
    if isinstance(result, Tensor):
        return result[:, length:]
    result.sequences = result.sequences[:, length:]
    return result


def _continuing(language: Any) -> Any:
    """The same model, whose assisted decoding goes on after what a cache holds.

    transformers 5 feeds the whole prompt in its first step there, even where it is in the cache;
    Phi3's own preparation reads everything again, by ids, where the longer rotary factors begin.
    """
    plain = type(language).__name__ == "Phi3ForCausalLM"
    kind = GenerationMixin if plain else type(language)
    prepare = kind.prepare_inputs_for_generation.__get__(language)

    @functools.wraps(prepare)
    def prepare_rest(input_ids: Tensor, **options: Any) -> dict[str, Any]:
        cache = options.get("cache", options.get("past_key_values"))  # by its name from 5.24 on
        past = 0 if cache is None else cache.get_seq_length()
        if past and options.get("next_sequence_length", 0) is None:
            options["next_sequence_length"] = input_ids.shape[1] - past
        return prepare(input_ids, **options)

    rest = copy.copy(language)
    rest.prepare_inputs_for_generation = prepare_rest
    return rest


class _WithoutPrompt:
    """A streamer that gets an empty prompt, as where the prompt is embeddings."""

    def __init__(self, streamer: Any) -> None:
        self.streamer = streamer
        self.seen_prompt = False

    def put(self, value: Tensor) -> None:
        self.streamer.put(value if self.seen_prompt else value[..., :0])
        self.seen_prompt = True

    def end(self) -> None:
        self.streamer.end()
