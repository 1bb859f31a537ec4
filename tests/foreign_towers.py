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
