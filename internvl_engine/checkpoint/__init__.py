"""Checkpoints of every family in every layout: names, files, configurations, loading.

    path or hub id --Source--> files --Contents--> tensors by published name --match, fill--> model

Nothing here knows a model class: one is passed in. What is public is loaded at its first use, as
only some of it needs transformers, which takes seconds to import.
"""

from importlib import import_module
from typing import TYPE_CHECKING

_PUBLIC = {  # name: the module that defines it
    "AbsentModule": "parts",
    "CheckpointError": "errors",
    "CheckpointNotFoundError": "errors",
    "Contents": "contents",
    "HUB_OPTIONS": "hub",
    "Origin": "saving",
    "PARTS": "parts",
    "PartNotLoadedError": "parts",
    "Placement": "placement",
    "Source": "locate",
    "check_takes": "identify",
    "choose_dtype": "dtypes",
    "computes_in_bfloat16": "dtypes",
    "download": "hub",
    "hub_options": "hub",
    "load_language_model": "language",
    "load_pretrained": "pretrained",
    "needs": "parts",
    "read_json": "files",
    "refuse_pointer": "files",
    "replaced_weights": "writing",
    "resolve_dtype": "dtypes",
    "save_chat": "saving",
    "save_forms": "saving_forms",
}
if TYPE_CHECKING:
    from .contents import Contents as Contents
    from .dtypes import choose_dtype as choose_dtype
    from .dtypes import computes_in_bfloat16 as computes_in_bfloat16
    from .dtypes import resolve_dtype as resolve_dtype
    from .errors import CheckpointError as CheckpointError
    from .errors import CheckpointNotFoundError as CheckpointNotFoundError
    from .files import read_json as read_json
    from .files import refuse_pointer as refuse_pointer
    from .hub import HUB_OPTIONS as HUB_OPTIONS
    from .hub import download as download
    from .hub import hub_options as hub_options
    from .identify import check_takes as check_takes
    from .language import load_language_model as load_language_model
    from .locate import Source as Source
    from .parts import PARTS as PARTS
    from .parts import AbsentModule as AbsentModule
    from .parts import PartNotLoadedError as PartNotLoadedError
    from .parts import needs as needs
    from .placement import Placement as Placement
    from .pretrained import load_pretrained as load_pretrained
    from .saving import Origin as Origin
    from .saving import save_chat as save_chat
    from .saving_forms import save_forms as save_forms
    from .writing import replaced_weights as replaced_weights

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> object:
    """Imports the module of a public name when the name is first asked for (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value
