"""InternViT on the fused operators: a layer, and the loop over the layers.

qkv = norm1(h) Wqkv                      one product
a = qk_norm_attention(qkv)               norms of q and k folded into the scores
n, h = add_rms_norm(a Wproj, h, ls1)     layer scale, residual and norm2 in one pass
m = gelu(n W1) W2                        GELU in the product's epilogue
n, h = add_rms_norm(m, h, ls2)           with norm1 of the next layer: the loop carries (n, h)

B batch, N tokens, C width
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from .. import kernels
from ..weights import is_hooked
from .base import FusedModule, holds, is_for_onnx, submodule
from .norm import add_normalize, add_scaled, epsilon, is_rms_norm, normalize

EXACT_GELU = ("GELU", "GELUActivation")  # torch's, and transformers' "gelu"


class FusedVisionEncoder(FusedModule):
    """The loop of InternVisionEncoder, ours or the published one, where nobody looks in between.

    Hooks, hidden states, gradients and layers that are not fused take the eager loop.
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
        """(B, N, C) to the last state, as the eager encoder gives it."""
        if output_hidden_states is None:
            output_hidden_states = getattr(self.config, "output_hidden_states", False)
        if output_hidden_states:
            return NotImplemented
        hidden = inputs_embeds
        normed = normalize(self.layers[0].first_norm, hidden) if self.layers else None
        for layer, following in zip(self.layers, [*self.layers[1:], None], strict=True):
            norm = None if following is None else following.first_norm
            normed, hidden = layer.run("step", normed, hidden, norm)
        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)
        return BaseModelOutput(last_hidden_state=hidden) if return_dict else (hidden,)


def carries(layer: Any) -> bool:
    """Whether a loop may run a layer by its `step`: it is fused, and nobody watches it."""
    steps = isinstance(layer, FusedModule) and layer.COMPILED == "step"
    return steps and not (is_hooked(layer) or layer.stays_eager or is_for_onnx())


class FusedVisionLayer(FusedModule):
    """InternVisionEncoderLayer, ours or the published one: (B, N, C) to (B, N, C)."""

    COMPILED = "step"
    NORMS: tuple[str, str] = ("norm1", "norm2")
    SCALES: tuple[str, str] = ("ls1", "ls2")
    ATTENTION = "attn"
    QK_NORMS: tuple[str, str] = ("attn.q_norm", "attn.k_norm")
    ACTIVATION = "mlp.act"
    LINEARS = {
        "qkv": ("attn.qkv",),
        "proj": ("attn.proj",),
        "fc1": ("mlp.fc1",),
        "fc2": ("mlp.fc2",),
    }
    COMPUTED: tuple[str, ...] = (
        "norm1", "norm2", "attn", "attn.q_norm", "attn.k_norm", "mlp", "mlp.act", "drop_path1",
        "drop_path2",
    )  # fmt: skip

    @classmethod
    def matches(cls, module: Any) -> bool:
        attention, mlp = getattr(module, cls.ATTENTION, None), getattr(module, "mlp", None)
        names = (name.rpartition(".")[2] for name in (*cls.LINEARS["qkv"], *cls.LINEARS["proj"]))
        return (
            holds(attention, *names, "num_heads")
            and holds(mlp, "fc1", "fc2")
            and holds(module, *cls.NORMS)
            and all(isinstance(getattr(module, name, None), nn.Parameter) for name in cls.SCALES)
        )

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        if not all(is_rms_norm(getattr(module, name)) for name in cls.NORMS):
            return "its norms are not RMSNorm"
        q_norm, k_norm = (submodule(module, name) for name in cls.QK_NORMS)
        if is_rms_norm(q_norm) and not (is_rms_norm(k_norm) and epsilon(q_norm) == epsilon(k_norm)):
            return "the norms of its queries and keys are not alike"
        activation = submodule(module, cls.ACTIVATION)
        exact = getattr(activation, "approximate", "none") == "none"
        if type(activation).__name__ not in EXACT_GELU or not exact:
            return f"its activation is {type(activation).__name__}, not the exact GELU"
        attention = getattr(module, cls.ATTENTION)
        scale = getattr(getattr(attention, "inner_attn", None), "softmax_scale", None)
        if scale not in (None, attention.scale):  # of flash-attn, where that is installed
            return f"its inner attention scales by {scale}, not by {attention.scale}"
        return kernels.unsupported_head_dim(
            getattr(module, cls.SCALES[0]).shape[0] // attention.num_heads
        )

    @classmethod
    def example_inputs(cls, module: Any, draw: Callable[..., Tensor]) -> tuple:
        return (draw(2, 17, getattr(module, cls.SCALES[0]).shape[0]),)

    @property
    def first_norm(self) -> nn.Module:
        """The norm of what comes in."""
        return getattr(self, self.NORMS[0])

    def drops(self) -> bool:
        """Also where stochastic depth drops samples, or the attention function probabilities."""
        paths = (getattr(self, name, None) for name in ("drop_path1", "drop_path2"))
        if not all(isinstance(path, nn.Identity | None) for path in paths):
            return True
        return (
            bool(getattr(getattr(self, self.ATTENTION), "attention_dropout", 0)) or super().drops()
        )

    def compute(self, hidden_states: Tensor) -> Tensor:
        normed = normalize(self.first_norm, hidden_states)
        return self.run("step", normed, hidden_states, None)[1]

    def step(
        self, normed: Tensor, hidden: Tensor, next_norm: nn.Module | None
    ) -> tuple[Any, Tensor]:
        """The layer as values: (n, h) of this layer to those of the next one.

        Args:
            normed: (B, N, C), the first norm of hidden.
            hidden: (B, N, C).
            next_norm: of the next layer; None after the last.

        Returns:
            (next_norm(h) or None, h), each (B, N, C).
        """
        scale1, scale2 = (getattr(self, name) for name in self.SCALES)
        second_norm = getattr(self, self.NORMS[1])
        normed, hidden = add_normalize(self._attend(normed), hidden, scale1, second_norm)
        update = self.product("fc2")(self.product("fc1")(normed, "gelu"))
        if next_norm is None:
            return None, add_scaled(update, hidden, scale2)
        return add_normalize(update, hidden, scale2, next_norm)

    def _attend(self, normed: Tensor) -> Tensor:
        attention = getattr(self, self.ATTENTION)
        qkv = self.product("qkv")(normed).unflatten(-1, (3, attention.num_heads, -1))
        q_norm, k_norm = (submodule(self, name) for name in self.QK_NORMS)
        q_weight = k_weight = None
        eps = 0.0
        if is_rms_norm(q_norm):
            q_weight, k_weight, eps = q_norm.weight, k_norm.weight, epsilon(q_norm) or 0.0
        output = kernels.qk_norm_attention(qkv, q_weight, k_weight, eps, attention.scale)
        return self.product("proj")(output.flatten(2))


class FusedTransformersVisionLayer(FusedVisionLayer):
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
    COMPUTED = ("layernorm_before", "layernorm_after", "attention", "attention.q_norm",
                "attention.k_norm", "mlp", "mlp.activation_fn")  # fmt: skip
