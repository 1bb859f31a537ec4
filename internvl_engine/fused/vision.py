"""InternViT on the fused operators: its layers, and the loop over them."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from ..weights import is_hooked
from .base import FusedModule, holds, is_for_onnx
from .norm import normalize
from .prenorm import FusedPreNormBlock


class FusedVisionEncoder(FusedModule):
    """The loop of InternVisionEncoder, ours or the published one, where nobody looks in between.

    Hooks, gradients and layers that are not fused take the eager loop.
    """

    @classmethod
    def matches(cls, module: Any) -> bool:
        return holds(module, "layers", "config") and isinstance(module.layers, nn.ModuleList)

    @property
    def stays_eager(self) -> bool:
        return torch.is_grad_enabled() or not all(map(carries, self.layers))

    def compute(
        self,
        inputs_embeds: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """(B, N, C) to the last state, and to those before it where asked for."""
        if output_hidden_states is None:
            output_hidden_states = getattr(self.config, "output_hidden_states", False)
        hidden, states = inputs_embeds, [inputs_embeds]
        normed = normalize(self.layers[0].first_norm, hidden) if self.layers else None
        for layer, following in zip(self.layers, [*self.layers[1:], None], strict=True):
            norm = None if following is None else following.first_norm
            normed, hidden = layer.run("step", normed, hidden, norm)
            if output_hidden_states:
                states.append(hidden)
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        output = BaseModelOutput(
            last_hidden_state=hidden, hidden_states=tuple(states) if output_hidden_states else None
        )
        return output if return_dict else output.to_tuple()


def carries(layer: Any) -> bool:
    """Whether a loop may run a layer by its `step`: it is fused, and nobody watches it."""
    steps = isinstance(layer, FusedModule) and layer.COMPILED == "step"
    return steps and not (is_hooked(layer) or layer.stays_eager or is_for_onnx())


class FusedVisionLayer(FusedPreNormBlock):
    """InternVisionEncoderLayer, ours or the published one."""

    NORMS = ("norm1", "norm2")
    SCALES = ("ls1", "ls2")
    ATTENTION = "attn"
    QK_NORMS = ("attn.q_norm", "attn.k_norm")
    ACTIVATION = "mlp.act"
    LINEARS = {
        "qkv": ("attn.qkv",),
        "proj": ("attn.proj",),
        "fc1": ("mlp.fc1",),
        "fc2": ("mlp.fc2",),
    }
    COMPUTED = (
        "norm1", "norm2", "attn", "attn.q_norm", "attn.k_norm", "mlp", "mlp.act", "drop_path1",
        "drop_path2",
    )  # fmt: skip

    @classmethod
    def matches(cls, module: Any) -> bool:
        return super().matches(module) and holds_scales(module, cls.SCALES)

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        attention = module.attn
        scale = getattr(getattr(attention, "inner_attn", None), "softmax_scale", None)
        if scale not in (None, attention.scale):  # of flash-attn, where that is installed
            return f"its inner attention scales by {scale}, not by {attention.scale}"
        return super().unsupported_reason(module)


class FusedTransformersVisionLayer(FusedPreNormBlock):
    """transformers' InternVLVisionLayer, whose class recomputes it in training."""

    NORMS = ("layernorm_before", "layernorm_after")
    SCALES = ("lambda_1", "lambda_2")
    ATTENTION = "attention"
    QK_NORMS = ("attention.q_norm", "attention.k_norm")
    ACTIVATION = "mlp.activation_fn"
    LINEARS = {
        "qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "proj": ("attention.projection_layer",),
        "fc1": ("mlp.fc1",),
        "fc2": ("mlp.fc2",),
    }
    COMPUTED = (
        "layernorm_before", "layernorm_after", "attention", "attention.q_norm", "attention.k_norm",
        "mlp", "mlp.activation_fn",
    )  # fmt: skip

    @classmethod
    def matches(cls, module: Any) -> bool:
        return super().matches(module) and holds_scales(module, cls.SCALES)


def holds_scales(module: Any, names: tuple[str, ...]) -> bool:
    """Whether a block holds its layer scales itself."""
    return all(isinstance(getattr(module, name, None), nn.Parameter) for name in names)
