"""Small decoders that are not ours, with weights large enough to tell apart what they do."""

from functools import partial

import torch
from published_model.modeling_qllama import LlamaForCausalLM as PublishedQLlama
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


DECODERS = {
    "published": published,
    "llama": llama,
    "grouped": partial(llama, heads=2),
    "qwen2": partial(llama, "Qwen2", heads=2),
    "qwen3": partial(llama, "Qwen3", heads=2),
    "mistral": partial(llama, "Mistral", heads=2, sliding_window=5),
}
IDS = torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(0))
LEFT = torch.tensor([[1] * 11, [0] * 4 + [1] * 7])  # 1 for a token, 0 for padding


def states(built: nn.Module, mask: torch.Tensor | None = None) -> torch.Tensor:
    """What the decoder makes of IDS, where a token is; the published one reads an image beside."""
    inputs = {"input_ids": IDS, "attention_mask": mask}
    if not hasattr(built, "config"):
        image = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(1))
        inputs |= {"vision_hidden_states": image.to(built.lm_head.weight.dtype)}
        inputs |= {"use_zero_attention_mask": mask is None}
    logits = built(**inputs).logits
    return logits if mask is None else logits[mask.bool()]


def close(actual, expected) -> None:
    """Asserts that float32 results differ by roundings."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)
