"""Fused modules: eager modules that compute on the operators. Known classes: recognition/."""

from .base import FusedModule
from .cross_attention import FusedCrossAttention
from .llama import (
    FusedLlamaAttention,
    FusedLlamaLayer,
    FusedPackedAttention,
    FusedPackedLayer,
)
from .mlp import FusedInternLM2MLP, FusedLlamaMLP, FusedPackedMLP
from .norm import FusedRMSNorm
from .pooling import FusedAttentionPooling
from .prenorm import FusedPreNormBlock
from .published import FusedInternLM2Attention, FusedPublishedAttention
from .qllama import FusedCausalLM, FusedDecoder, FusedDecoderLayer
from .towers import (
    FusedCLIPLayer,
    FusedDinov2Layer,
    FusedDinov2LayerOf4,
    FusedResidualAttentionBlock,
    FusedTimmBlock,
    FusedViTLayer,
    FusedViTLayerOf4,
)
from .vision import FusedTransformersVisionLayer, FusedVisionEncoder, FusedVisionLayer

__all__ = [
    "FusedAttentionPooling",
    "FusedCLIPLayer",
    "FusedCausalLM",
    "FusedCrossAttention",
    "FusedDecoder",
    "FusedDecoderLayer",
    "FusedDinov2Layer",
    "FusedDinov2LayerOf4",
    "FusedInternLM2Attention",
    "FusedInternLM2MLP",
    "FusedLlamaAttention",
    "FusedLlamaLayer",
    "FusedLlamaMLP",
    "FusedModule",
    "FusedPackedAttention",
    "FusedPackedLayer",
    "FusedPackedMLP",
    "FusedPreNormBlock",
    "FusedPublishedAttention",
    "FusedRMSNorm",
    "FusedResidualAttentionBlock",
    "FusedTimmBlock",
    "FusedTransformersVisionLayer",
    "FusedViTLayer",
    "FusedViTLayerOf4",
    "FusedVisionEncoder",
    "FusedVisionLayer",
]
