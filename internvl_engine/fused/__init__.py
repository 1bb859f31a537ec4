"""Fused modules: eager modules that compute on the operators. Known classes: recognition.py."""

from .base import FusedModule
from .cross_attention import FusedCrossAttention
from .llama import FusedLlamaAttention, FusedLlamaMLP, FusedPublishedAttention
from .norm import FusedRMSNorm
from .pooling import FusedAttentionPooling
from .qllama import FusedDecoder, FusedDecoderLayer
from .vision import FusedTransformersVisionLayer, FusedVisionEncoder, FusedVisionLayer

__all__ = [
    "FusedAttentionPooling",
    "FusedCrossAttention",
    "FusedDecoder",
    "FusedDecoderLayer",
    "FusedLlamaAttention",
    "FusedLlamaMLP",
    "FusedModule",
    "FusedPublishedAttention",
    "FusedRMSNorm",
    "FusedTransformersVisionLayer",
    "FusedVisionEncoder",
    "FusedVisionLayer",
]
