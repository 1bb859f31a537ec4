"""A small chat model with random weights, and prompts for it."""

import torch

from internvl_engine import VisionLanguageConfig, VisionLanguageModel

IMAGE = 60
TOKENS = 4  # of a tile of 28 px in patches of 7
VISION = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "image_size": 28,
    "patch_size": 7,
    "norm_type": "layer_norm",
    "qk_normalization": False,
    "qkv_bias": True,
    "initializer_range": 0.2,
    "initializer_factor": 1.0,
}
LLM = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def chat_model(vision=None, llm=None, **changes) -> VisionLanguageModel:
    """In eval mode, with the placeholder's id."""
    config = VisionLanguageConfig(
        vision_config=VISION | (vision or {}),
        llm_config=LLM | (llm or {}),
        **{"ps_version": "v2", "img_context_token_id": IMAGE, **changes},
    )
    return VisionLanguageModel(config).eval()


def tiles(count, side=28):
    return torch.randn(count, 3, side, side)


def ids(*rows):
    """Left-padded (ids, mask) of prompts, whose parts are ids or "image"."""
    flat = [
        [t for part in row for t in ([IMAGE] * TOKENS if part == "image" else [part])]
        for row in rows
    ]
    length = max(map(len, flat))
    return (
        torch.tensor([[0] * (length - len(row)) + row for row in flat]),
        torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in flat]),
    )
