"""Configurations of the models, and the translation of published `config.json` files.

vision.py     InternViT
internvl.py   InternVL-14B and its presets
chat.py       the chat family: vision tower, projector and any causal language model
language.py   language models of published chat checkpoints as transformers' own classes
"""

from .chat import VisionLanguageConfig
from .internvl import PRESETS, PUBLISHED_MODEL_TYPE, InternVLConfig
from .vision import InternVisionConfig

__all__ = [
    "PRESETS",
    "PUBLISHED_MODEL_TYPE",
    "InternVLConfig",
    "InternVisionConfig",
    "VisionLanguageConfig",
]
