"""The eager model: plain, readable PyTorch, and the reference of everything faster."""

from .internvl import InternVL_C, InternVL_G, InternVLModel
from .vision import InternVisionModel

__all__ = ["InternVL_C", "InternVL_G", "InternVLModel", "InternVisionModel"]
