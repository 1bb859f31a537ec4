"""transformers' own InternViT, small."""

import pytest
import torch


def vision_tower(**changes):
    modeling = pytest.importorskip("transformers.models.internvl.modeling_internvl")
    from transformers import InternVLVisionConfig

    torch.manual_seed(0)
    fields = {
        "hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96,
        "num_hidden_layers": 3, "image_size": (28, 28), "patch_size": (7, 7),
        "norm_type": "rms_norm", "use_qk_norm": True,
    }  # fmt: skip
    return modeling.InternVLVisionModel(InternVLVisionConfig(**(fields | changes))).eval()


def composite(text="qwen2", vision_layers=2, text_layers=2, tie=False, **changes):
    """transformers' InternVLForConditionalGeneration, small; 60 is the id of an image token.

    tie: whether the head's weight is that of the embeddings.
    """
    transformers = pytest.importorskip("transformers", minversion="4.52")
    vision = vision_tower(num_hidden_layers=vision_layers, **changes).config.to_dict()
    llm = {
        "model_type": text, "vocab_size": 61, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": text_layers, "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    llm["tie_word_embeddings"] = tie
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=llm, image_token_id=60, tie_word_embeddings=tie
    )
    return transformers.InternVLForConditionalGeneration(config).eval()
