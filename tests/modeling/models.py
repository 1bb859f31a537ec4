"""Small models with seeded weights that are not those of a golden case."""

import torch
from transformers import LlamaConfig

from internvl_engine.configuration import InternVLConfig
from internvl_engine.modeling import InternVL_G
from internvl_engine.modeling.qllama import LlamaForCausalLM

VISION = {
    "hidden_size": 48,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "image_size": 28,
    "patch_size": 7,
}
QLLAMA = {
    "vocab_size": 61,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config(**changes) -> InternVLConfig:
    """The small configuration, with top-level fields changed."""
    fields = {
        "vision_config": VISION, "qllama_config": QLLAMA, "clip_embed_dim": 24,
        "attn_pool_num_heads": 4, "num_query_token": 6,
    }  # fmt: skip
    return InternVLConfig(**(fields | changes))


def model(**changes) -> InternVL_G:
    """An InternVL_G in eval mode whose weights are large enough to tell apart what they do."""
    return _spread(InternVL_G(config(**changes)))


def decoder(**changes) -> LlamaForCausalLM:
    """QLLaMA alone, from a plain LlamaConfig with the extra fields."""
    fields = {"num_query_token": 6, "cross_attention_frequency": 2, "vision_hidden_size": 48}
    return _spread(LlamaForCausalLM(LlamaConfig(**(QLLAMA | fields | changes))))


def pixels(batch: int = 2, side: int = 28) -> torch.Tensor:
    """Random images (batch, 3, side, side)."""
    return torch.randn(batch, 3, side, side)


def _spread(built):
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.ndim > 1 or "query_tokens" in name:
                parameter.normal_(std=0.15)
            elif "norm" in name or "ls" in name:
                parameter.uniform_(0.5, 1.5)
    return built.eval()
