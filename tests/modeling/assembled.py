"""Small parts, and chat models that are made of them."""

import torch
from tiny_chat import tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from internvl_engine import InternVisionConfig, InternVisionModel, VisionLanguageModel

from models import VISION

FP32 = {"dtype": "float32"}


def vision(**changes):
    torch.manual_seed(1)
    return InternVisionModel(InternVisionConfig(**(VISION | changes))).eval()


def language(vocab=340, tie=False, **changes):
    fields = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1,
              "intermediate_size": 48, "num_hidden_layers": 2}  # fmt: skip
    torch.manual_seed(2)
    config = LlamaConfig(vocab_size=vocab, tie_word_embeddings=tie, **(fields | changes))
    built = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return built


def assemble(**options):
    parts = {"vision": vision(), "language": language(), "tokenizer": tokenizer(added=False)}
    return VisionLanguageModel.from_parts(**(parts | options))


def example(built, side=28, seed=0):
    """One tile, and a prompt with its placeholders."""
    generator = torch.Generator().manual_seed(seed)
    context = [built.img_context_token_id] * built.num_image_token
    return {
        "pixel_values": torch.randn(1, 3, side, side, generator=generator),
        "input_ids": torch.tensor([[5, *context, 6, 7]]),
    }
