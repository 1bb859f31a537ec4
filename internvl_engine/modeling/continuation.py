"""What `VisionLanguageModel.generate` hands to transformers.

Prompts come as embeddings, since their images are no tokens; then transformers returns new tokens
only, as the published code does, and its logits processors see nothing else. Ways to decode that
look at the ids of the prompt (prompt lookup, an assistant) get them, with a cache that has read the
embeddings.

    B prompts of L tokens
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from .masks import count_positions
from .prompting import align_left


def continue_prompts(
    model: Any,
    pixel_values: Tensor | None,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    visual_features: Tensor | None,
    generation_config: GenerationConfig | None,
    options: dict[str, Any],
) -> Any:
    """New tokens; arguments and results as `VisionLanguageModel.generate`."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"generate: attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, "
            f"got {tuple(mask.shape)}"
        )
    mask = mask.to(input_ids.device)
    if options.get("past_key_values") is None:
        input_ids, mask = align_left(input_ids, mask)
    embeds = model.embed(pixel_values, input_ids, visual_features=visual_features)
    mask = mask.to(embeds.device)
    options = {"generation_config": generation_config, "attention_mask": mask, **options}
    if not _reads_ids(generation_config, options):
        return model.language_model.generate(inputs_embeds=embeds, **options)
    return _with_ids(model, embeds, input_ids.to(embeds.device), mask, options)


def _reads_ids(config: GenerationConfig | None, options: dict[str, Any]) -> bool:
    lookup = options.get(
        "prompt_lookup_num_tokens", getattr(config, "prompt_lookup_num_tokens", None)
    )
    return bool(lookup) or options.get("assistant_model") is not None


def _with_ids(
    model: Any, embeds: Tensor, ids: Tensor, mask: Tensor, options: dict[str, Any]
) -> Any:
    """The prompt but for its last token is read here; the rest goes on with ids."""
    language = model.language_model
    cache = language.model(
        inputs_embeds=embeds[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=count_positions(mask)[:, :-1],
        use_cache=True,
    ).past_key_values
    assistant = options.get("assistant_model")
    if assistant is not None:
        options["assistant_model"] = getattr(assistant, "language_model", assistant)
    result = language.generate(input_ids=ids, past_key_values=cache, **options)
    if isinstance(result, Tensor):
        return result[:, ids.shape[1] :]
    result.sequences = result.sequences[:, ids.shape[1] :]
    return result
