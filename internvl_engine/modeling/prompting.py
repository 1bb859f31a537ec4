"""What `InternVLModel.generate` hands to transformers: [queries | prompt] and the lengths.

B images, N vision tokens of width C_v, Q queries of width C, L prompt tokens
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import Cache

from .masks import count_positions
from .qllama import LlamaForCausalLM

PUBLISHED_MAX_LENGTH = 20  # of `generate` without a length: one BOS and 19 new tokens


def align_left(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves the padding of every row to its left, keeping the order of the tokens; (B, L) each."""
    order = attention_mask.bool().long().argsort(dim=1, stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)


@torch.no_grad()
def prompt_inputs(
    decoder: LlamaForCausalLM,
    query_tokens: Tensor,
    visual_features: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    cache: Cache | None,
    copies: int,
) -> dict[str, Any]:
    """The model inputs of transformers' `generate` for [queries | prompt].

    Where every row will be repeated (beams, several sequences), the prompt is run once here and its
    cache expanded, in place of running every copy.

    Args:
        decoder: QLLaMA with its head.
        query_tokens: (1, Q, C). visual_features: (B, N, C_v).
        input_ids, attention_mask: (B or 1, L), padded on the left.
        cache: what holds the first positions already, or is to hold them; None for a new one.
        copies: rows that will be made of each.
    """
    batch = visual_features.shape[0]
    embeds = decoder.get_input_embeddings()(input_ids).expand(batch, -1, -1)
    embeds = torch.cat((query_tokens.expand(batch, -1, -1).to(embeds), embeds), dim=1)
    mask = attention_mask.expand(batch, -1)
    mask = torch.cat((mask.new_ones(batch, query_tokens.shape[1]), mask), dim=1)
    bos = decoder.config.bos_token_id
    inputs: dict[str, Any] = {
        # Published sequences begin with a BOS that the model never sees.
        "input_ids": input_ids.new_full((batch, 1), 1 if bos is None else bos),
        "inputs_embeds": embeds,
        "attention_mask": mask,
        "vision_hidden_states": visual_features,
        "use_zero_attention_mask": True,
    }
    if copies > 1:
        past = 0 if cache is None else cache.get_seq_length()
        cache = decoder.model(
            inputs_embeds=embeds[:, past:-1],
            attention_mask=mask[:, :-1],
            position_ids=count_positions(mask)[:, past:-1],
            past_key_values=cache,
            vision_hidden_states=visual_features,
            use_zero_attention_mask=True,
            use_cache=True,
        ).past_key_values
        cache.batch_repeat_interleave(copies)
        del inputs["vision_hidden_states"]  # the queries have read it
    if cache is not None:
        inputs["past_key_values"] = cache
    return inputs


def copies_asked(config: GenerationConfig | None, arguments: dict[str, Any]) -> int:
    """How many rows `generate` makes of each: beams, or sequences to return."""
    return max(
        arguments.get(name) or getattr(config, name, None) or 1
        for name in ("num_beams", "num_return_sequences")
    )


def lengths_in_new_tokens(
    config: GenerationConfig | None, arguments: dict[str, Any]
) -> dict[str, Any]:
    """arguments, with the published meaning of lengths (BOS and new tokens) as new tokens."""
    arguments = dict(arguments)

    def asked(name: str) -> Any:
        return arguments.pop(name, None) or getattr(config, name, None)

    new, longest = asked("max_new_tokens"), asked("max_length")
    least, shortest = asked("min_new_tokens"), asked("min_length")
    arguments["max_new_tokens"] = new or (longest or PUBLISHED_MAX_LENGTH) - 1
    if least or shortest:
        arguments["min_new_tokens"] = least or shortest - 1
    return arguments
