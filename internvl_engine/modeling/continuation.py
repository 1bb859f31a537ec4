"""What `VisionLanguageModel.generate` hands to transformers.

Prompts come as embeddings, since their images are no tokens; then transformers returns new tokens
only, as the published code does, and its logits processors see nothing else. Ways to decode that
look at the ids of the prompt (prompt lookup, an assistant) get them, with a cache that has read the
embeddings.

    B prompts of L tokens
"""

import copy
import functools
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, Phi3ForCausalLM

from .masks import count_positions
from .placeholders import check_prompts
from .prompting import align_left


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
    embeds = model.embed(pixel_values, input_ids, flags, visual_features=visual_features)
    mask = mask.to(embeds.device)
    options = {"generation_config": generation_config, "attention_mask": mask, **options}
    if not _reads_ids(generation_config, options):
        return model.language_model.generate(inputs_embeds=embeds, **options)
    return _with_ids(model, embeds, input_ids.to(embeds.device), mask, options)


def _reads_ids(config: GenerationConfig | None, options: dict[str, Any]) -> bool:
    name = "prompt_lookup_num_tokens"
    lookup = options.get(name) or getattr(config, name, None)
    return bool(lookup) or options.get("assistant_model") is not None


def _with_ids(
    model: Any, embeds: Tensor, ids: Tensor, mask: Tensor, options: dict[str, Any]
) -> Any:
    """The prompt but for its last token is read here; transformers goes on with ids and cache.

    Rotary embeddings may depend on the length, so all of it is read, and the last token forgotten.
    A cache of sliding windows that has forgotten the first tokens cannot do that.
    """
    language = getattr(model.language_model, "get_base_model", lambda: model.language_model)()
    cache = options.pop("past_key_values", None)
    past = 0 if cache is None else cache.get_seq_length()
    length = ids.shape[1]
    window = getattr(language.config, "sliding_window", None)
    end = length if window is None or length < window else length - 1
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
    plain = isinstance(language, Phi3ForCausalLM)
    kind = GenerationMixin if plain else type(language)
    prepare = kind.prepare_inputs_for_generation.__get__(language)

    @functools.wraps(prepare)
    def prepare_rest(input_ids: Tensor, **options: Any) -> dict[str, Any]:
        cache = options.get("past_key_values")
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
