"""InternViT, the vision encoder of all InternVL, in plain PyTorch.

    h = patches + class token + positions
    48 times:  h = h + ls1 * proj(attention(qk_norm(qkv(norm1(h)))))
               h = h + ls2 * mlp(norm2(h))

The 6B has RMSNorm and norms of q and k, the 300M LayerNorm and a qkv bias; none has a final norm.
Source: OpenGVLab/InternVL, modeling_intern_vit.py; Chen et al., InternVL, 2023.

    B batch, N = 1 + patches tokens (257 at 224 px), C = 3200 width, H = 25 heads, D = 128 head size
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

from .. import reference
from ..configuration import InternVisionConfig
from .base import InternVLPreTrainedModel


class InternVisionModel(InternVLPreTrainedModel):
    """InternViT: images to one feature vector a token."""

    config_class: Any = InternVisionConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["InternVisionEncoderLayer"]

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = InternVisionEmbeddings(config)
        self.encoder = InternVisionEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def resize_pos_embeddings(self, old_size: int, new_size: int, patch_size: int) -> None:
        """Resizes the position table to the grid of another image size (bicubic, in float32).

        Args:
            old_size: kept for callers of the published method; the old grid is the table's own.
            new_size: side of the new images, in pixels.
            patch_size: side of a patch, in pixels.
        """
        table = self.embeddings.position_embedding
        side = new_size // patch_size
        with torch.no_grad():
            resized = interpolate_positions(table, side, side)
        self.embeddings.position_embedding = nn.Parameter(resized, table.requires_grad)
        self.embeddings.image_size = self.config.image_size = new_size

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        pixel_embeds: Tensor | None = None,
    ) -> tuple | BaseModelOutputWithPooling:
        """Encodes images.

        Args:
            pixel_values: (B, 3, height, width), normalised, the dtype of the weights; sides are
                multiples of the patch size. Positions are interpolated to grids other than the
                table's.
            output_hidden_states: also return the input of every layer and the last output.
            return_dict: False returns a tuple.
            pixel_embeds: (B, N, C), an embedded sequence in place of pixel_values.

        Returns:
            last_hidden_state (B, N, C), pooler_output (B, C): the state of the class token, and
            hidden_states: layers + 1 tensors (B, N, C), where asked for.

        Raises:
            ValueError: neither or both inputs came, or they have the wrong shape.
        """
        output_hidden_states = _default(output_hidden_states, self.config.output_hidden_states)
        return_dict = _default(return_dict, self.config.return_dict)
        if (pixel_values is None) == (pixel_embeds is None):
            raise ValueError("InternVisionModel: give either pixel_values or pixel_embeds")
        if pixel_embeds is None:
            hidden = self.embeddings(pixel_values)
        elif pixel_embeds.ndim == 3:
            hidden = pixel_embeds
        else:
            raise ValueError(
                "InternVisionModel: pixel_embeds must be (batch, tokens, width), got shape "
                f"{tuple(pixel_embeds.shape)}"
            )
        encoded = self.encoder(hidden, output_hidden_states=output_hidden_states)
        last = encoded.last_hidden_state
        output = BaseModelOutputWithPooling(
            last_hidden_state=last, pooler_output=last[:, 0], hidden_states=encoded.hidden_states
        )
        return output if return_dict else output.to_tuple()


class InternVisionEncoder(nn.Module):
    """The layers, recomputed in the backward pass while training (`gradient_checkpointing`)."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.config = config
        last = max(config.num_hidden_layers - 1, 1)
        self.layers = nn.ModuleList(
            InternVisionEncoderLayer(config, config.drop_path_rate * index / last)
            for index in range(config.num_hidden_layers)
        )
        self.gradient_checkpointing = True

    def forward(
        self,
        inputs_embeds: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> tuple | BaseModelOutput:
        """inputs_embeds: (B, N, C). Returns the last state and, where asked for, all of them."""
        states = [inputs_embeds]
        hidden = inputs_embeds
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            if recompute:
                hidden = _checkpoint(self)(layer, hidden)
            else:
                hidden = layer(hidden)
            if output_hidden_states:
                states.append(hidden)
        output = BaseModelOutput(
            last_hidden_state=hidden, hidden_states=tuple(states) if output_hidden_states else None
        )
        return output.to_tuple() if return_dict is False else output


class InternVisionEncoderLayer(nn.Module):
    """One pre-norm layer with layer scale and stochastic depth: (B, N, C) to (B, N, C)."""

    def __init__(self, config: InternVisionConfig, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.embed_dim = config.hidden_size
        self.attn = InternAttention(config)
        self.mlp = InternMLP(config)
        self.norm1 = _norm(config)
        self.norm2 = _norm(config)
        scale = config.initializer_factor
        self.ls1 = nn.Parameter(torch.full((config.hidden_size,), scale))
        self.ls2 = nn.Parameter(torch.full((config.hidden_size,), scale))
        self.drop_path1 = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.drop_path2 = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden = hidden_states
        # Norms of a wider dtype than the tower's give back the tower's.
        attended = self.attn(self.norm1(hidden).to(hidden.dtype))
        hidden = hidden + self.drop_path1(attended * self.ls1)
        return hidden + self.drop_path2(self.mlp(self.norm2(hidden).to(hidden.dtype)) * self.ls2)


class InternAttention(nn.Module):
    """Multi-head attention with RMSNorm of q and k over all heads: (B, N, C) to (B, N, C)."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_dim = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = self.embed_dim // self.num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(self.embed_dim, 3 * self.embed_dim, bias=config.qkv_bias)
        self.attn_drop = nn.Dropout(config.attention_dropout)
        self.proj_drop = nn.Dropout(config.dropout)
        self.qk_normalization = config.qk_normalization
        if config.qk_normalization:
            self.q_norm = InternRMSNorm(self.embed_dim, eps=config.qk_eps)
            self.k_norm = InternRMSNorm(self.embed_dim, eps=config.qk_eps)
        self.proj = nn.Linear(self.embed_dim, self.embed_dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        qkv = self.qkv(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim))
        dropout = self.attn_drop if self.training and self.attn_drop.p > 0 else None
        output = reference.qk_norm_attention(
            qkv,
            self.q_norm.weight if self.qk_normalization else None,
            self.k_norm.weight if self.qk_normalization else None,
            self.config.qk_eps,
            self.scale,
            dropout,
        )
        return self.proj_drop(self.proj(output.flatten(2).to(hidden_states.dtype)))


class InternMLP(nn.Module):
    """fc2(gelu(fc1(x))), the exact GELU: (B, N, C) to (B, N, C)."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.act = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(hidden_states)))


class InternRMSNorm(nn.Module):
    """RMSNorm, rounded to the dtype of the input before the weight is applied."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return reference.rms_norm(hidden_states, self.weight, self.variance_epsilon)


class DropPath(nn.Module):
    """Stochastic depth: drops whole samples while training and scales up the rest.

    Huang et al., Deep Networks with Stochastic Depth, 2016.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep) if keep > 0 else x * mask


class InternVisionEmbeddings(nn.Module):
    """Patches, class token and positions: (B, 3, height, width) to (B, N, C)."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_dim = config.hidden_size
        self.image_size = config.image_size
        self.patch_size = config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(1, 1, self.embed_dim))
        self.patch_embedding = nn.Conv2d(3, self.embed_dim, self.patch_size, self.patch_size)
        self.num_patches = (self.image_size // self.patch_size) ** 2
        self.num_positions = self.num_patches + 1
        self.position_embedding = nn.Parameter(torch.randn(1, self.num_positions, self.embed_dim))

    def reset_extra_parameters(self, std: float) -> None:
        nn.init.trunc_normal_(self.class_embedding, std=std)
        nn.init.trunc_normal_(self.position_embedding, std=std)

    def forward(self, pixel_values: Tensor) -> Tensor:
        shape = tuple(pixel_values.shape)
        if (
            len(shape) != 4
            or shape[1] != 3
            or shape[2] % self.patch_size
            or shape[3] % self.patch_size
        ):
            raise ValueError(
                "InternVisionModel: pixel_values must be (batch, 3, height, width), both multiples "
                f"of the patch size {self.patch_size}, got shape {shape}"
            )
        patches = self.patch_embedding(pixel_values)  # (B, C, rows, columns)
        rows, columns = patches.shape[-2:]
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = torch.cat(
            (self.class_embedding.expand(shape[0], 1, -1).to(tokens.dtype), tokens), 1
        )
        return tokens + interpolate_positions(self.position_embedding, rows, columns).to(
            tokens.dtype
        )


def interpolate_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """The position table of another grid: (1, 1 + side**2, C) to (1, 1 + rows * columns, C).

    Bicubic without antialiasing, in float32; the class token's row stays. The same grid returns the
    table itself.
    """
    side = math.isqrt(table.shape[1] - 1)
    if (rows, columns) == (side, side):
        return table
    grid = table[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
    return torch.cat((table[:, :1], grid.flatten(2).transpose(1, 2).to(table.dtype)), dim=1)


def _norm(config: InternVisionConfig) -> nn.Module:
    kind = InternRMSNorm if config.norm_type == "rms_norm" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.layer_norm_eps)


def _checkpoint(module: nn.Module) -> Any:
    """The recomputation transformers was told to use, or PyTorch's."""
    chosen = getattr(module, "_gradient_checkpointing_func", None)
    return chosen or (lambda layer, *args: checkpoint(layer, *args, use_reentrant=False))


def _default(value: bool | None, otherwise: bool | None) -> bool:
    return bool(otherwise if value is None else value)
