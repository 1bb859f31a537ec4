"""One layer of each tower of the 14B at its real width, with channels as large as real ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OUTLIERS, FACTOR = 4, 1000.0  # channels of each tower, and their size, of the others'
IMAGES, TEXTS = 4, 4
VOCABULARY = 512


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
    _make_outliers(model, generator)
    model.eval().requires_grad_(False)
    size = config.vision_config.image_size
    pixels = torch.randn(IMAGES, 3, size, size, generator=generator, dtype=torch.float32,
                         device="cpu")  # fmt: skip
    ids = torch.randint(3, VOCABULARY, (TEXTS, 14), generator=generator, dtype=torch.int64,
                        device="cpu")  # fmt: skip
    model = prepare(model)
    pixels = pixels.to(model.dtype)
    return {
        "C": model.encode_image(pixels, "InternVL-C"),
        "G": model.encode_image(pixels, "InternVL-G"),
        "text": model.get_text_features(ids, torch.ones_like(ids)).flatten(0, 1),
    }


_CONFIG: dict[str, Any] = {
    "vision_config": {"num_hidden_layers": 1},
    "qllama_config": {"num_hidden_layers": 1, "vocab_size": VOCABULARY},
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


def _make_outliers(model: Any, generator: torch.Generator) -> None:
    """Makes a few channels of what enters the towers large, the same for every token."""
    table = model.qllama.get_input_embeddings().weight
    positions = model.vision_model.embeddings.position_embedding
    for parameter in (positions, model.query_tokens, table):
        channels = torch.randperm(parameter.shape[-1], generator=generator)[:OUTLIERS]
        signs = torch.randint(0, 2, (OUTLIERS,), generator=generator, dtype=torch.int64,
                              device="cpu")  # fmt: skip
        parameter.data[..., channels] = FACTOR * (2.0 * signs - 1)
