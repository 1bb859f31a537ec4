"""Rotary embedding whose base grows with the sequence, as InternLM2 and old LLaMA have it.

    base' = base * (f * n / m - (f - 1)) ** (d / (d - 2))   where n > m

    n keys so far, m trained positions, f factor, d head size

Cached keys keep the rotation of their time. transformers' own keeps the table of the longest call
it has seen, so that an answer depends on earlier calls; here every call is a fresh model's.
Source: OpenGVLab/InternVL, modeling_internlm2.py.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..configuration.rope import rope_of


class DynamicRotary(nn.Module):
    """Cosine and sine of positions, in place of transformers' `LlamaRotaryEmbedding`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        theta, scaling = rope_of(config)
        assert theta is not None and scaling is not None and scaling["rope_type"] == "dynamic"
        self.base, self.factor = theta, scaling["factor"]
        self.max_positions = config.max_position_embeddings
        heads = config.num_attention_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, N, d) each, in the dtype of x.

        Args:
            x: (batch, N, C), the embeddings; its device and dtype count.
            position_ids: (batch or 1, N). n is the greatest of them plus one, or N.
        """
        with torch.autocast(x.device.type, enabled=False):
            keys = (position_ids.max() + 1).clamp(min=x.shape[1]).to(torch.float64)
            stretch = self.factor * keys / self.max_positions - (self.factor - 1)
            power = self.head_dim / (self.head_dim - 2)
            base = (self.base * stretch.clamp(min=1.0) ** power).to(x.device, torch.float32)
            steps = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=x.device)
            frequencies = 1.0 / base ** (steps / self.head_dim)
            angles = position_ids[..., None].to(x.device, torch.float32) * frequencies
            angles = torch.cat((angles, angles), dim=-1)
            return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def has_dynamic_rotary(language_model: Any) -> bool:
    """Whether a language model's rope_scaling is dynamic."""
    _, scaling = rope_of(language_model.config)
    return scaling is not None and scaling["rope_type"] == "dynamic"


def replace_dynamic_rotary(language_model: Any) -> None:
    """Gives a LLaMA whose rope_scaling is dynamic the rotary embedding of this file."""
    is_llama = type(language_model).__name__ == "LlamaForCausalLM"
    if is_llama and has_dynamic_rotary(language_model):
        language_model.model.rotary_emb = DynamicRotary(language_model.config)
