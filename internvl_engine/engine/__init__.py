"""The engines: a model with its processor, and everything people do with it.

`InternVL` embeds, compares, classifies, describes and finds images by InternVL-14B; `InternVLChat`
talks about them by the models of the chat family.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chat import InternVLChat
    from .internvl import InternVL

__all__ = ["InternVL", "InternVLChat"]
_HOMES = {"InternVL": ".internvl", "InternVLChat": ".chat"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:  # each engine needs what the other does not
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
