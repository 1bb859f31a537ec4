"""Drop-in modules on the fused operators, each built from an eager module that it can give back."""

from .base import FusedModule
from .norm import FusedRMSNorm
from .pooling import FusedAttentionPooling
from .qllama import FusedDecoderLayer, FusedLlamaMLP
from .vision import FusedTransformersVisionLayer, FusedVisionLayer

__all__ = [
    "FusedAttentionPooling",
    "FusedDecoderLayer",
    "FusedLlamaMLP",
    "FusedModule",
    "FusedRMSNorm",
    "FusedTransformersVisionLayer",
    "FusedVisionLayer",
]
