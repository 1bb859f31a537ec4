"""Which class takes a checkpoint whole."""

from pathlib import Path
from typing import Any

from ..checkpoint import Source, hub_options
from ..checkpoint.identify import family_of
from .chat import VisionLanguageModel
from .internvl import InternVLModel


def whole_class(source: str | Path, **options: Any) -> Any:
    """The class of a checkpoint's whole model.

    Args:
        source: directory, weight file or hub id.
        options: of which those about the hub are taken.

    Returns:
        VisionLanguageModel for a chat checkpoint in either layout; InternVLModel for everything
        else, which says what it is where it is not one.

    Raises:
        CheckpointError: it is not there, or its config.json is damaged.
    """
    family = family_of(Source.find(source, **hub_options(options)).config or {})
    is_chat = family is not None and family.builds == VisionLanguageModel.config_class.model_type
    return VisionLanguageModel if is_chat else InternVLModel
