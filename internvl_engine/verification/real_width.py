"""One layer of each tower of the 14B at its real width, with channels as large as real ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OUTLIERS, FACTOR = 4, 1000.0  # channels of each tower, and their size, of the others'
IMAGES, TEXTS, WORDS = 4, 4, 14


def embeddings_at_real_width(
    prepare: Callable[[Any], Any], seed: int = 0, **sizes: Any
) -> dict[str, Tensor]:
    """The embeddings of random images and texts by a model with random weights.

    Args:
        prepare: takes the model, float32 and in evaluation, and gives the one to run.
        seed: of weights and inputs, the same at every call.
        sizes: fields of InternVLConfig in place of the real ones.

    Returns:
        "C" and "G" embeddings (IMAGES, E), and the states of QLLaMA over texts, "text" (tokens,
        C): with one layer, what the last token of a text has of those before it is less than what
        bfloat16 tells apart.
    """
    from ..configuration import InternVLConfig
    from ..modeling import InternVL_G

    generator = torch.Generator().manual_seed(seed)
    config = InternVLConfig(**(_CONFIG | sizes))
    with torch.device("meta"):
        model = InternVL_G(config)
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        parameter.data = _weights(name, parameter, generator)
    # Not in the table of words: in real models large channels come out of the first layers, and a
    # row of 8 bits that had them would have nothing left for the others.
    for parameter in (model.vision_model.embeddings.position_embedding, model.query_tokens):
        _make_outliers(parameter.data, generator)
    model.eval().requires_grad_(False)
    size = config.vision_config.image_size
    pixels = torch.randn(IMAGES, 3, size, size, generator=generator, dtype=torch.float32,
                         device="cpu")  # fmt: skip
    width = config.qllama_config.hidden_size
    words = torch.randn(TEXTS, WORDS, width, generator=generator, dtype=torch.float32, device="cpu")
    _make_outliers(words, generator)
    model = prepare(model)
    pixels = pixels.to(model.dtype)
    return {
        "C": model.encode_image(pixels, "InternVL-C"),
        "G": model.encode_image(pixels, "InternVL-G"),
        "text": _states(model, words.to(model.dtype)).flatten(0, 1),
    }


_CONFIG: dict[str, Any] = {
    "vision_config": {"num_hidden_layers": 1},
    "qllama_config": {"num_hidden_layers": 1, "vocab_size": 512},
}


def _weights(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Values that keep activations at unit scale."""
    empty = torch.empty(like.shape, dtype=torch.float32, device="cpu")
    if like.ndim == 0:
        return empty.fill_(1.0)
    if "embed" in name or name == "query_tokens":
        return empty.normal_(generator=generator)
    if like.ndim > 1:
        width = like[0].numel() if name != "text_projection" else like.shape[0]
        return empty.normal_(std=width**-0.5, generator=generator)
    return empty.zero_() if "bias" in name else empty.uniform_(0.5, 1.5, generator=generator)


def _states(model: Any, words: Tensor) -> Tensor:
    """What QLLaMA, as a plain LLaMA, makes of embedded texts (B, L, C)."""
    from ..modeling.masks import AttentionMask

    length = words.shape[1]
    mask = AttentionMask("causal", length, length)
    decoder = model.language_model.model
    return decoder.forward_train(inputs_embeds=words, attention_mask=mask).last_hidden_state


def _make_outliers(states: Tensor, generator: torch.Generator) -> None:
    """Makes a few channels of what enters a tower large, the same for every token."""
    channels = torch.randperm(
        states.shape[-1], generator=generator, dtype=torch.int64, device="cpu"
    )[:OUTLIERS]
    signs = torch.randint(0, 2, (OUTLIERS,), generator=generator, dtype=torch.int64, device="cpu")
    states[..., channels] = FACTOR * (2.0 * signs - 1)
