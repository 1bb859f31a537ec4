"""The classes that are known to compute what a fused class does, by where they are defined.

A class is trusted where nobody gave it another forward, and its parts where they are of the same
file or known themselves.
"""

from typing import Any

from ..fused import (
    FusedAttentionPooling,
    FusedCausalLM,
    FusedCLIPLayer,
    FusedCrossAttention,
    FusedDecoder,
    FusedDecoderLayer,
    FusedDinov2Layer,
    FusedDinov2LayerOf4,
    FusedInternLM2Attention,
    FusedInternLM2MLP,
    FusedLlamaAttention,
    FusedLlamaLayer,
    FusedLlamaMLP,
    FusedModule,
    FusedPackedAttention,
    FusedPackedLayer,
    FusedPackedMLP,
    FusedPublishedAttention,
    FusedResidualAttentionBlock,
    FusedRMSNorm,
    FusedTimmBlock,
    FusedTransformersVisionLayer,
    FusedVisionEncoder,
    FusedVisionLayer,
    FusedViTLayer,
    FusedViTLayerOf4,
)
from ..fused.base import submodule

OURS = "internvl_engine.modeling."
MODELS = "transformers.models."
LLAMA = (f"{MODELS}llama.modeling_llama",)
MISTRAL = (f"{MODELS}mistral.modeling_mistral",)
PHI3 = (f"{MODELS}phi3.modeling_phi3",)
QWEN2 = (f"{MODELS}qwen2.modeling_qwen2",)
QWEN3 = (f"{MODELS}qwen3.modeling_qwen3",)
QWEN3_MOE = (f"{MODELS}qwen3_moe.modeling_qwen3_moe",)
# Fused class -> the names of its eager classes and where those are defined: the module's path or,
# for remote code and copies of the published repository, the name of its file.
KNOWN: dict[type[FusedModule], dict[str, tuple[str, ...]]] = {
    FusedVisionEncoder: {"InternVisionEncoder": (f"{OURS}vision", "modeling_intern_vit")},
    FusedVisionLayer: {"InternVisionEncoderLayer": (f"{OURS}vision", "modeling_intern_vit")},
    FusedTransformersVisionLayer: {
        "InternVLVisionLayer": (f"{MODELS}internvl.modeling_internvl",),
    },
    FusedTimmBlock: {"Block": ("timm.models.vision_transformer",)},
    FusedCLIPLayer: {
        "CLIPEncoderLayer": (f"{MODELS}clip.modeling_clip",),
        "SiglipEncoderLayer": (f"{MODELS}siglip.modeling_siglip",),
        "Siglip2EncoderLayer": (f"{MODELS}siglip2.modeling_siglip2",),
    },
    **{
        kind: {
            "Dinov2Layer": (f"{MODELS}dinov2.modeling_dinov2",),
            "Dinov2WithRegistersLayer": (
                f"{MODELS}dinov2_with_registers.modeling_dinov2_with_registers",
            ),
        }
        for kind in (FusedDinov2Layer, FusedDinov2LayerOf4)
    },
    **{
        kind: {"ViTLayer": (f"{MODELS}vit.modeling_vit",)}
        for kind in (FusedViTLayer, FusedViTLayerOf4)
    },
    FusedResidualAttentionBlock: {
        "ResidualAttentionBlock": ("open_clip.transformer",),
        "CustomResidualAttentionBlock": ("open_clip.transformer",),  # named, never served
    },
    FusedCausalLM: {"LlamaForCausalLM": (f"{OURS}qllama",)},
    FusedDecoder: {"LlamaModel": (f"{OURS}qllama",)},
    FusedDecoderLayer: {"LlamaDecoderLayer": (f"{OURS}qllama_layers",)},
    FusedAttentionPooling: {"AttentionPoolingBlock": (f"{OURS}pooling", "modeling_internvl")},
    FusedLlamaLayer: {
        "LlamaDecoderLayer": LLAMA, "MistralDecoderLayer": MISTRAL, "Qwen2DecoderLayer": QWEN2,
        "Qwen3DecoderLayer": QWEN3, "Qwen3MoeDecoderLayer": QWEN3_MOE,
    },
    FusedPackedLayer: {"Phi3DecoderLayer": PHI3},
    FusedLlamaAttention: {
        "LlamaAttention": LLAMA, "MistralAttention": MISTRAL, "Qwen2Attention": QWEN2,
        "Qwen3Attention": QWEN3, "Qwen3MoeAttention": QWEN3_MOE,
        "GptOssAttention": (f"{MODELS}gpt_oss.modeling_gpt_oss",),
    },
    FusedPackedAttention: {"Phi3Attention": PHI3},
    FusedInternLM2Attention: {"InternLM2Attention": ("modeling_internlm2",)},
    FusedPublishedAttention: {"LlamaAttention": ("modeling_qllama",)},
    FusedCrossAttention: {"LlamaCrossAttention": ("modeling_qllama",)},
    FusedLlamaMLP: {
        "LlamaMLP": (f"{OURS}qllama_layers", *LLAMA, "modeling_qllama"), "MistralMLP": MISTRAL,
        "Qwen2MLP": QWEN2, "Qwen3MLP": QWEN3, "Qwen3MoeMLP": QWEN3_MOE,
    },
    FusedPackedMLP: {"Phi3MLP": PHI3},
    FusedInternLM2MLP: {"InternLM2MLP": ("modeling_internlm2",)},
    FusedRMSNorm: {
        "InternRMSNorm": (f"{OURS}vision", "modeling_intern_vit"),
        "LlamaRMSNorm": (f"{OURS}qllama_layers", *LLAMA, "modeling_qllama"),
        "MistralRMSNorm": MISTRAL, "Qwen2RMSNorm": QWEN2, "Qwen3RMSNorm": QWEN3,
        "Qwen3MoeRMSNorm": QWEN3_MOE, "Phi3RMSNorm": PHI3,
        "InternLM2RMSNorm": ("modeling_internlm2",),
        # apex's, which the published code takes where apex is installed
        "FusedRMSNorm": ("apex.normalization.fused_layer_norm",),
    },
}  # fmt: skip
LOOPS = (FusedVisionEncoder, FusedDecoder, FusedCausalLM)  # whose layers are fused by themselves
# Whose attention, MLP and norms are fused by themselves where the layer as a whole cannot be.
LAYERS = (FusedLlamaLayer, FusedPackedLayer)
# Served where the table has the class: what they do beside computing could not be tried.
BY_TABLE_ONLY = (*LOOPS, *LAYERS, FusedLlamaAttention, FusedPackedAttention)
# Parts that a known class may have from elsewhere, by where those are defined, and by name too.
TRUSTED = (
    "torch.nn.modules.", "transformers.activations", "timm.layers.activations", "timm.layers.drop",
    "timm.models.layers.drop",
)  # fmt: skip
PARTS = {
    "Attention": ("timm.layers.attention", "timm.models.vision_transformer"),
    "LayerNorm": ("timm.layers.norm",),
    "LayerScale": ("timm.layers.layer_scale", "timm.models.vision_transformer"),
    "Mlp": ("timm.layers.mlp",),
}
# Names that others give to something else.
COMMON = {"Block", "LlamaDecoderLayer", "LlamaForCausalLM", "LlamaModel", "ResidualAttentionBlock"}
# Classes that the report names even where they hold something else.
EXPECTED = {name for kind in KNOWN if kind not in LAYERS for name in KNOWN[kind]} - COMMON


def is_known(kind: type[FusedModule], module: Any) -> bool:
    """Whether the table has the class of a module, and nobody gave that another forward."""
    path = path_of(module)
    places = KNOWN[kind].get(type(module).__name__, ())
    own = getattr(type(module).forward, "__module__", path) == path
    return own and any(place in (path, path.rpartition(".")[2]) for place in places)


def is_expected(module: Any) -> bool:
    """Whether the report names a module even where it holds something else than it should."""
    known = (is_known(kind, module) for kind in KNOWN if kind not in LAYERS)
    return type(module).__name__ in EXPECTED or any(known)


def path_of(module: Any) -> str:
    """The name of the Python module that defines a module's class."""
    return type(module).__module__


def has_known_parts(kind: type[FusedModule], module: Any) -> bool:
    """Whether all that is computed without being called is of the same file, or known itself."""
    parts = (submodule(module, name) for name in kind.COMPUTED)
    return all(
        path_of(part) == path_of(module) == getattr(type(part).forward, "__module__", None)
        or path_of(part).startswith(TRUSTED)
        or path_of(part) in PARTS.get(type(part).__name__, ())
        or is_known(FusedRMSNorm, part)
        for part in parts
        if part is not None
    )
