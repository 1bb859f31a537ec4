"""The pre-norm blocks of vision towers from elsewhere: what their parts are called.

transformers 5 renamed the parts of DINOv2 and ViT; files and towers of both kinds are around.
"""

from typing import Any

from .prenorm import FusedPreNormBlock
from .vision import holds_scales


class FusedTimmBlock(FusedPreNormBlock):
    """timm's Block, that of `vit_intern300m` and the plain ViTs, and of those who write like it."""

    NORMS = ("norm1", "norm2")
    SCALES = ("ls1.gamma", "ls2.gamma")
    ATTENTION = "attn"
    ACTIVATION = "mlp.act"
    LINEARS = {
        "qkv": ("attn.qkv",),
        "proj": ("attn.proj",),
        "fc1": ("mlp.fc1",),
        "fc2": ("mlp.fc2",),
    }
    COMPUTED = (
        "norm1", "norm2", "attn", "attn.q_norm", "attn.k_norm", "attn.norm", "mlp", "mlp.act",
        "mlp.norm", "ls1", "ls2", "drop_path", "drop_path1", "drop_path2",
    )  # fmt: skip

    @classmethod
    def matches(cls, module: Any) -> bool:  # but for scales of its own, as InternViT's
        return super().matches(module) and not holds_scales(module, ("ls1", "ls2"))


class FusedCLIPLayer(FusedPreNormBlock):
    """transformers' encoder layers of CLIP, SigLIP and their kin."""

    NORMS = ("layer_norm1", "layer_norm2")
    ATTENTION = "self_attn"
    ACTIVATION = "mlp.activation_fn"
    LINEARS = {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "proj": ("self_attn.out_proj",),
        "fc1": ("mlp.fc1",),
        "fc2": ("mlp.fc2",),
    }
    COMPUTED = ("layer_norm1", "layer_norm2", "self_attn", "mlp", "mlp.activation_fn")


class FusedViTLayer(FusedPreNormBlock):
    """transformers' ViTLayer."""

    NORMS = ("layernorm_before", "layernorm_after")
    ATTENTION = "attention"
    ACTIVATION = "mlp.activation_fn"
    LINEARS = {
        "qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "proj": ("attention.o_proj",),
        "fc1": ("mlp.fc1",),
        "fc2": ("mlp.fc2",),
    }
    COMPUTED: tuple[str, ...] = (
        "layernorm_before", "layernorm_after", "attention", "mlp", "mlp.activation_fn",
    )  # fmt: skip


class FusedViTLayerOf4(FusedViTLayer):
    """The same of transformers 4."""

    ATTENTION = "attention.attention"
    ACTIVATION = "intermediate.intermediate_act_fn"
    LINEARS = {
        "qkv": (
            "attention.attention.query",
            "attention.attention.key",
            "attention.attention.value",
        ),
        "proj": ("attention.output.dense",),
        "fc1": ("intermediate.dense",),
        "fc2": ("output.dense",),
    }
    COMPUTED = (
        "layernorm_before", "layernorm_after", "attention", "attention.attention",
        "attention.output", "intermediate", "intermediate.intermediate_act_fn", "output",
    )  # fmt: skip


class FusedDinov2Layer(FusedViTLayer):
    """transformers' layers of DINOv2, with registers too."""

    NORMS = ("norm1", "norm2")
    SCALES = ("layer_scale1.lambda1", "layer_scale2.lambda1")
    COMPUTED: tuple[str, ...] = (
        "norm1", "norm2", "attention", "mlp", "mlp.activation_fn", "layer_scale1", "layer_scale2",
        "drop_path",
    )  # fmt: skip


class FusedDinov2LayerOf4(FusedDinov2Layer):
    """The same of transformers 4."""

    ATTENTION = "attention.attention"
    ACTIVATION = "mlp.activation"
    LINEARS = FusedViTLayerOf4.LINEARS | {"fc1": ("mlp.fc1",), "fc2": ("mlp.fc2",)}
    COMPUTED = (
        "norm1", "norm2", "attention", "attention.attention", "attention.output", "mlp",
        "mlp.activation", "layer_scale1", "layer_scale2", "drop_path",
    )  # fmt: skip


class FusedResidualAttentionBlock(FusedPreNormBlock):
    """open_clip's ResidualAttentionBlock, whose attention is an nn.MultiheadAttention."""

    NORMS = ("ln_1", "ln_2")
    SCALES = ("ls_1.gamma", "ls_2.gamma")
    ATTENTION = "attn"
    ACTIVATION = "mlp.gelu"
    LINEARS = {
        "qkv": ("attn.in_proj",),
        "proj": ("attn.out_proj",),
        "fc1": ("mlp.c_fc",),
        "fc2": ("mlp.c_proj",),
    }
    COMPUTED = ("ln_1", "ln_2", "attn", "mlp", "mlp.gelu", "ls_1", "ls_2")

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        if getattr(module, "attn_mask", None) is not None:  # OpenAI's text tower
            return "it brings a mask of its own"
        if module.attn.add_zero_attn:
            return "its attention adds a key of zeros"
        return super().unsupported_reason(module)
