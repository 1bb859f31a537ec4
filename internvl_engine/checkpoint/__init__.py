"""Checkpoints of the family in every published layout: names, files, configurations, loading.

    source --locate--> Location --Contents--> tensors by published name --match--> model --fill-->

Nothing here knows a model class: one is passed in.
"""

from .contents import Contents
from .dtypes import computes_in_bfloat16, resolve_dtype
from .errors import CheckpointError, CheckpointNotFoundError
from .locate import Location, locate
from .merge import Reader
from .parts import PARTS, AbsentModule, PartNotLoadedError, needs
from .placement import Placement
from .pretrained import load_pretrained

__all__ = [
    "PARTS",
    "AbsentModule",
    "CheckpointError",
    "CheckpointNotFoundError",
    "Contents",
    "Location",
    "PartNotLoadedError",
    "Placement",
    "Reader",
    "computes_in_bfloat16",
    "load_pretrained",
    "locate",
    "needs",
    "resolve_dtype",
]
