"""Fused modules: eager modules that compute on the operators. Known classes: recognition.py."""

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
from .published import FusedInternLM2Attention, FusedPublishedAttention
from .qllama import FusedDecoder, FusedDecoderLayer
from .vision import FusedTransformersVisionLayer, FusedVisionEncoder, FusedVisionLayer

__all__ = [
    "FusedAttentionPooling",
    "FusedCrossAttention",
    "FusedDecoder",
    "FusedDecoderLayer",
    "FusedInternLM2Attention",
    "FusedInternLM2MLP",
    "FusedLlamaAttention",
    "FusedLlamaLayer",
    "FusedLlamaMLP",
    "FusedModule",
    "FusedPackedAttention",
    "FusedPackedLayer",
    "FusedPackedMLP",
    "FusedPublishedAttention",
    "FusedRMSNorm",
    "FusedTransformersVisionLayer",
    "FusedVisionEncoder",
    "FusedVisionLayer",
]
