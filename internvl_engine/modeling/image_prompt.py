"""Image embeddings and text as the inputs of any causal language model of transformers."""

from typing import Any

import torch
from torch import Tensor


def image_prompt(
    language_model: Any,
    image_embeds: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    image_token_id: int | None = None,
) -> dict[str, Tensor]:
    """The arguments of `language_model(...)` or `.generate(...)` for prompts with an image each.

    Args:
        language_model: a causal language model that takes inputs_embeds.
        image_embeds: (B, Q, D), of a QueryBridge or a LlavaTower; cast to the embeddings' dtype.
        input_ids: (B, L), or (1, L) for every image. To generate, pad on the left.
        attention_mask: (B, L), 0 where padded; None is all ones.
        labels: (B, L), -100 where nothing is to be predicted.
        image_token_id: the placeholder that the image replaces, once in every row; None puts the
            image in front.

    Returns:
        inputs_embeds and attention_mask, and labels where they came, each S = Q + L long, or
        Q + L - 1 where a placeholder is replaced. Nothing is predicted at the image.

    Raises:
        ValueError: widths or batches do not fit, or a row has not exactly one placeholder.
    """
    words = language_model.get_input_embeddings()
    count, size, width = image_embeds.shape
    if width != words.weight.shape[-1]:
        raise ValueError(
            f"image_prompt: image_embeds are {width} wide, the embeddings of "
            f"{type(language_model).__name__} {words.weight.shape[-1]}; build the bridge with "
            "output_hidden_size= of the language model"
        )
    if input_ids.shape[0] not in (1, count):
        raise ValueError(f"image_prompt: {count} images for {input_ids.shape[0]} prompts")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    texts = [input_ids, mask] + ([] if labels is None else [labels])
    input_ids, mask, *rest = (text.expand(count, -1) for text in texts)
    if image_token_id is None:
        starts, skip = [0] * count, 0
    else:
        starts, skip = _placeholders(input_ids == image_token_id), 1
        input_ids = input_ids.masked_fill(input_ids == image_token_id, 0)
    embeds = words(input_ids)

    def join(text: Tensor, image: Tensor) -> Tensor:
        rows = zip(text, image.to(text.device, text.dtype), starts, strict=True)
        return torch.stack([torch.cat((t[:at], i, t[at + skip :])) for t, i, at in rows])

    inputs = {
        "inputs_embeds": join(embeds, image_embeds),
        "attention_mask": join(mask, mask.new_ones(count, size)),
    }
    if rest:
        inputs["labels"] = join(rest[0], rest[0].new_full((count, size), -100))
    return inputs


def _placeholders(found: Tensor) -> list[int]:
    """Where the one placeholder of every row (B, L) is."""
    counts = found.sum(1)
    if (counts != 1).any():
        raise ValueError(
            "image_prompt: every row needs one image token, the rows have "
            f"{', '.join(map(str, counts.tolist()))}"
        )
    return found.long().argmax(1).tolist()
