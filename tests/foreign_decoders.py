"""Small decoders that are not ours, with weights large enough to tell apart what they do."""

import torch
from published_qllama import LlamaForCausalLM as PublishedQLlama
from torch import nn

from models import QLLAMA, decoder


def published() -> nn.Module:
    """The published QLLaMA, with the weights of ours."""
    ours = decoder()
    built = PublishedQLlama(ours.config).eval()
    built.load_state_dict(ours.state_dict(), strict=True)
    return built


def llama(kind: str = "Llama", heads: int = 4, attention: str = "sdpa", **changes) -> nn.Module:
    """transformers' decoder of a kind, with so many heads for its keys."""
    import transformers

    fields = {"num_key_value_heads": heads, "head_dim": 16, "max_position_embeddings": 128}
    config = getattr(transformers, f"{kind}Config")(**(QLLAMA | fields | changes))
    built = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    built.set_attn_implementation(attention)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.uniform_(0.5, 1.5)
    return built
