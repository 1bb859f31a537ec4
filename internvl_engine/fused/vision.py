"""A layer of InternViT on the fused operators.

    qkv = norm1(h) Wqkv                      one product
    a = qk_norm_attention(qkv)               norms of q and k folded into the scores
    n, h = add_rms_norm(a Wproj, h, ls1)     layer scale, residual and norm2 in one pass
    m = gelu(n W1) W2                        GELU in the product's epilogue
    n', h = add_rms_norm(m, h, ls2)          with norm1 of the next layer, which takes it

What is merged, packed or handed on: projection.py and sharing.py.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import kernels
from .base import FusedModule, holds
from .norm import add_normalize, add_scaled, is_rms_norm, normalize
from .projection import Projection
from .sharing import Handoff, counted

MAX_HEAD_DIM = 128
EXACT_GELU = ("GELU", "GELUActivation")  # torch's, and transformers' "gelu"


class FusedVisionLayer(FusedModule):
    """In place of InternVisionEncoderLayer, ours or the published one: (B, N, C) to (B, N, C).

    Its result is `counted`: the layers of QLLaMA share what they make of the last one's.
    """

    NORMS = ("norm1", "norm2")
    SCALES = ("ls1", "ls2")
    ATTENTION = "attn"
    QKV: tuple[str, ...] = ("qkv",)
    PROJ = "proj"
    ACTIVATION = "act"
    DROP_PATHS: tuple[str, ...] = ("drop_path1", "drop_path2")

    before: Handoff | None = None  # from the layer before, and to the layer after
    after: Handoff | None = None

    def __init__(self, eager: Any, inference: bool) -> None:
        super().__init__(eager, inference)
        attention = self.ATTENTION
        names = (f"{attention}.{name}" for name in self.QKV)
        self._qkv = Projection(eager, *names, inference=inference)
        self._proj = Projection(eager, f"{attention}.{self.PROJ}", inference=inference)
        self._fc1 = Projection(eager, "mlp.fc1", inference=inference)
        self._fc2 = Projection(eager, "mlp.fc2", inference=inference)
        paths = (getattr(eager, name, None) for name in self.DROP_PATHS)
        self._drops |= any(not isinstance(path, nn.Identity | None) for path in paths)

    @classmethod
    def claims(cls, module: Any) -> bool:
        attention, mlp = getattr(module, cls.ATTENTION, None), getattr(module, "mlp", None)
        return (
            holds(attention, *cls.QKV, cls.PROJ, "num_heads")
            and holds(mlp, "fc1", "fc2")
            and holds(module, *cls.NORMS)
            and all(isinstance(getattr(module, name, None), nn.Parameter) for name in cls.SCALES)
        )

    @classmethod
    def objection(cls, module: Any) -> str | None:
        attention = getattr(module, cls.ATTENTION)
        width = getattr(module, cls.SCALES[0]).shape[0]
        head_dim = width // attention.num_heads
        if not all(is_rms_norm(getattr(module, name)) for name in cls.NORMS):
            return "its norms are not RMSNorm"
        activation = getattr(module.mlp, cls.ACTIVATION, None)
        if type(activation).__name__ not in EXACT_GELU or _is_approximate(activation):
            return f"its activation is {type(activation).__name__}, not the exact GELU"
        if head_dim > MAX_HEAD_DIM or head_dim % 8:
            return f"its heads are {head_dim} wide; the kernels take multiples of 8 up to 128"
        return None

    @classmethod
    def trial(cls, module: Any, draw: Callable[..., Tensor]) -> tuple:
        return (draw(2, 17, getattr(module, cls.SCALES[0]).shape[0]),)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.stays_eager:
            return self.eager.forward(hidden_states)
        hidden = hidden_states
        norm1, norm2 = (getattr(self, name) for name in self.NORMS)
        scale1, scale2 = (getattr(self, name) for name in self.SCALES)
        normed = None if self.before is None else self.before.take(hidden)
        if normed is None:
            normed = normalize(norm1, hidden)
        normed, hidden = add_normalize(self._attend(normed), hidden, scale1, norm2)
        update = self._fc2(self._fc1(normed, "gelu"))
        if self.after is None or not self.after.is_open:
            return counted(add_scaled, update, hidden, scale2)
        normed, hidden = counted(add_normalize, update, hidden, scale2, self.after.norm)
        self.after.put(hidden, normed)
        return hidden

    def _attend(self, normed: Tensor) -> Tensor:
        attention = getattr(self, self.ATTENTION)
        heads = attention.num_heads
        qkv = self._qkv(normed).unflatten(-1, (3, heads, -1))
        q_norm: Any = getattr(attention, "q_norm", None)
        k_norm: Any = getattr(attention, "k_norm", None)
        if is_rms_norm(q_norm) and is_rms_norm(k_norm):
            weights, eps = (q_norm.weight, k_norm.weight), q_norm.variance_epsilon
        else:
            weights, eps = (None, None), 0.0
        output = kernels.qk_norm_attention(qkv, *weights, eps, attention.scale)
        return self._proj(output.flatten(2))


class FusedTransformersVisionLayer(FusedVisionLayer):
    """In place of transformers' InternVLVisionLayer, whose class recomputes it in training."""

    NORMS = ("layernorm_before", "layernorm_after")
    SCALES = ("lambda_1", "lambda_2")
    ATTENTION = "attention"
    QKV = ("q_proj", "k_proj", "v_proj")
    PROJ = "projection_layer"
    ACTIVATION = "activation_fn"
    DROP_PATHS = ()


def _is_approximate(activation: object) -> bool:
    return getattr(activation, "approximate", "none") != "none"
