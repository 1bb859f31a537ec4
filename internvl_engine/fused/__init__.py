"""Drop-in modules on the fused operators, each built from an eager module that it can give back."""

from .base import FusedModule
from .cross_attention import FusedCrossAttention
from .llama import FusedLlamaAttention, FusedLlamaMLP, FusedPublishedAttention
from .norm import FusedRMSNorm
from .pooling import FusedAttentionPooling
from .qllama import FusedDecoderLayer
from .vision import FusedTransformersVisionLayer, FusedVisionLayer

__all__ = [
    "FusedAttentionPooling",
    "FusedCrossAttention",
    "FusedDecoderLayer",
    "FusedLlamaAttention",
    "FusedLlamaMLP",
    "FusedModule",
    "FusedPublishedAttention",
    "FusedRMSNorm",
    "FusedTransformersVisionLayer",
    "FusedVisionLayer",
]
