"""The eager model: plain, readable PyTorch, and the reference of everything faster."""

import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForZeroShotImageClassification,
)

from ..configuration import InternVisionConfig, InternVLConfig, VisionLanguageConfig
from .chat import VisionLanguageModel
from .internvl import InternVL_C, InternVL_G, InternVLModel
from .vision import InternVisionModel

__all__ = ["InternVL_C", "InternVL_G", "InternVLModel", "InternVisionModel", "VisionLanguageModel"]

# The class that a configuration names in `architectures`, or else the first.
COMPOSITES = (InternVLModel, InternVL_C, InternVL_G)
AutoModel.register(InternVLConfig, COMPOSITES, exist_ok=True)
AutoModelForZeroShotImageClassification.register(
    InternVLConfig,
    # The pipelines of transformers 4 fail where several classes are entered for one configuration.
    InternVLModel if transformers.__version__.startswith("4.") else COMPOSITES,
    exist_ok=True,
)
AutoModel.register(InternVisionConfig, InternVisionModel, exist_ok=True)
AutoModel.register(VisionLanguageConfig, VisionLanguageModel, exist_ok=True)
# Both names stand in published `auto_map`s.
AutoModelForCausalLM.register(VisionLanguageConfig, VisionLanguageModel, exist_ok=True)
