"""Which classes are known to compute what a fused class does, and how another is found out.

A known class is trusted by where it is defined (table.py); its structure (names and shapes of what
it holds) is checked all the same. A module with that structure from elsewhere may scale, clamp or
turn in between: of 182 norms of transformers 5.23 that look alike, 16 compute something else
(Gemma's, Qwen3-Next's: weights count from 1). A table would miss the 166 or take the 16 for them,
so one module of each class and configuration is tried (trial.py).
"""

from inspect import signature
from typing import Any

from torch import nn

from ..fused import FusedModule, FusedPreNormBlock
from .table import (
    BY_TABLE_ONLY,
    KNOWN,
    LAYERS,
    LOOPS,
    has_known_parts,
    is_expected,
    is_known,
    path_of,
)
from .trial import compare, settings_of

__all__ = ["LAYERS", "LOOPS", "Recognition", "is_expected"]


class Recognition:
    """Finds the fused class of a module; of every kind that it does not know one is tried."""

    def __init__(self, check: bool = False) -> None:
        """check: try known classes too."""
        self.check = check
        self._tried: dict[tuple, str | None] = {}

    def kind_of(self, module: Any) -> type[FusedModule] | None:
        """The fused class for a module of this structure, or None."""
        for kind in KNOWN:
            by_name = kind in LOOPS or kind in LAYERS  # others that look alike are not spoken of
            if kind.matches(module) and (not by_name or is_known(kind, module)):
                return kind
        return None

    def unsupported_reason(self, kind: type[FusedModule], module: Any) -> str | None:
        """Why a module of this structure must stay eager, or None. Never raises."""
        try:
            known, reason = is_known(kind, module), kind.unsupported_reason(module)
            if reason is not None:
                return reason
            if kind not in BY_TABLE_ONLY and not _same_arguments(kind, type(module)):
                return f"its forward takes other arguments than that of {kind.__name__}"
            if kind in BY_TABLE_ONLY:
                if known and (kind not in LAYERS or has_known_parts(kind, module)):
                    return None
                name = f"{path_of(module)}.{type(module).__name__}"
                return f"{name} is not known to compute what {kind.__name__} does"
            trusted = known and has_known_parts(kind, module) and not _returns_more(kind, module)
            if trusted and not self.check:
                return None
            key = (kind, settings_of(module))
            if key not in self._tried:
                self._tried[key] = compare(kind, module)
            return self._tried[key]
        except Exception as error:  # noqa: BLE001  somebody's code, which may do anything
            return f"it could not be tried: {type(error).__name__}: {error}"


def _returns_more(kind: type[FusedModule], module: Any) -> bool:
    """Whether a forward that could return attentions may return None in their place."""
    return bool(kind.facts(type(module)).get("RETURNS_TUPLE"))


def _same_arguments(one: type[FusedModule], other: type[nn.Module]) -> bool:
    """Whether modules of two classes can be called alike; a single argument may have any name."""
    if one.compute is FusedModule.compute:  # a loop within the eager forward
        return True
    if issubclass(one, FusedPreNormBlock):  # looks at every argument of a call
        return True
    names = [list(signature(each).parameters) for each in (one.compute, other.forward)]
    return names[0] == names[1] or [len(each) for each in names] == [2, 2]
