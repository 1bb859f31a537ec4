"""The eager model: plain, readable PyTorch, and the reference of everything faster."""

from transformers import AutoModel

from ..configuration import InternVisionConfig, InternVLConfig
from .internvl import InternVL_C, InternVL_G, InternVLModel
from .vision import InternVisionModel

__all__ = ["InternVL_C", "InternVL_G", "InternVLModel", "InternVisionModel"]

# AutoModel takes the class that a configuration names in `architectures`, or else the first.
AutoModel.register(InternVLConfig, (InternVLModel, InternVL_C, InternVL_G), exist_ok=True)
AutoModel.register(InternVisionConfig, InternVisionModel, exist_ok=True)
