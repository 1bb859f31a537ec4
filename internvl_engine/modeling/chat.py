"""The chat family: InternViT, pixel shuffle, projector and a causal language model.

    features = mlp1(pixel_shuffle(vision_model(pixels)[select_layer] without the class token))
    embeddings of the placeholders in the prompt = features;  language_model(embeddings)

Source: OpenGVLab/InternVL, modeling_internvl_chat.py; Chen et al., InternVL 1.5, 2024.

    T tiles, N tokens a tile (256 at 448 px), D vision width, C width of the language model,
    B prompts, L tokens a prompt
"""

from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..configuration import VisionLanguageConfig
from ..configuration.language import language_class
from .base import InternVLPreTrainedModel
from .lora import ChatLora
from .vision import InternVisionModel


class VisionLanguageModel(ChatLora, InternVLPreTrainedModel):
    """A chat model; its parameters have the published names."""

    config_class: Any = VisionLanguageConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["InternVisionEncoderLayer"]

    def __init__(self, config: VisionLanguageConfig) -> None:
        super().__init__(config)
        self.vision_model = InternVisionModel(config.vision_config)
        self.language_model: Any = language_class(config.llm_config)(config.llm_config)
        self.img_context_token_id = config.img_context_token_id
        self.post_init()
        self.mlp1 = _projector(config)  # keeps PyTorch's own initialisation, as published
        if config.use_backbone_lora:
            self.wrap_backbone_lora(config.use_backbone_lora, config.backbone_lora_alpha)
        if config.use_llm_lora:
            self.wrap_llm_lora(config.use_llm_lora, config.llm_lora_alpha)

    @property
    def mlp_projector(self) -> nn.Sequential:
        return self.mlp1

    @property
    def num_image_token(self) -> int:
        """Tokens a tile of the configured size becomes."""
        grid = self.config.image_size // self.config.vision_config.patch_size
        return int(grid**2 * self.config.downsample_ratio**2)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        """Features (T, N, C) of tiles (T, 3, S, S)."""
        layer = self.config.select_layer
        outputs: Any = self.vision_model(pixel_values, output_hidden_states=True, return_dict=True)
        states = outputs.hidden_states[layer][:, 1:]
        side = int(states.shape[1] ** 0.5)
        block = round(1 / self.config.downsample_ratio)
        width = states.shape[-1]
        # (tiles, R, r, T, t, D) to (tiles, R, T, r, t, D)
        x = states.reshape(-1, side // block, block, side // block, block, width).transpose(2, 3)
        if self.config.ps_version == "v1":
            x = x.transpose(1, 2)
        return self.mlp1(x.reshape(len(x), (side // block) ** 2, block * block * width))


def _projector(config: VisionLanguageConfig) -> nn.Sequential:
    width = config.vision_config.hidden_size * round(1 / config.downsample_ratio) ** 2
    hidden = config.llm_config.hidden_size
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, hidden),
        ACT2FN[config.projector_hidden_act] if config.projector_hidden_act != "gelu" else nn.GELU(),
        nn.Linear(hidden, hidden),
    )
