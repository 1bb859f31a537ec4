"""Parts of a composite: which weights each use needs, and what stands in place of the rest.

The table of them is in families.py.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from .families import INTERNVL_14B, Family
from .names import canonical

PARTS = tuple(INTERNVL_14B.parts)  # the smallest first


def needs(parts: str, family: Family = INTERNVL_14B) -> Callable[[str], bool]:
    """Whether the parts need a weight, by its published name.

    Raises:
        ValueError: there are no such parts.
    """
    if parts not in family.parts:
        raise ValueError(f"parts must be one of {', '.join(family.parts)}, got {parts!r}")
    pattern = re.compile("|".join(family.parts[parts]))
    return lambda name: pattern.match(name) is not None


def parts_with(names: Iterable[str], family: Family = INTERNVL_14B) -> list[str]:
    """The parts that hold any of the weights of these published names."""
    names = list(names)
    return [parts for parts in family.parts if any(map(needs(parts, family), names))]


class PartNotLoadedError(RuntimeError):
    """A use of something that the loaded parts leave out."""


class PartNotLoadedAttributeError(PartNotLoadedError, AttributeError):
    """The same where an attribute was asked for: `hasattr` says no."""


def _explanation(name: str, weights: Iterable[str], parts: str, family: Family) -> str:
    others = " or ".join(map(repr, parts_with(weights, family)))
    return (
        f"this model was loaded with parts={parts!r}, which leave {name} out; what you asked for "
        f"needs it: load with parts={others}"
    )


class AbsentModule(nn.Module):
    """Stands in place of a module that the loaded parts leave out; it holds nothing."""

    def __init__(self, explanation: str, replaced: nn.Module) -> None:
        super().__init__()
        self.explanation = explanation
        self.submodules = frozenset(child for child, _ in replaced.named_children())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise PartNotLoadedError(self.explanation)

    def __getattr__(self, name: str) -> Any:
        # No AttributeError for these: a property between the user and here would swallow it.
        if name in self.__dict__.get("submodules", ()):
            raise PartNotLoadedError(self.explanation)
        raise PartNotLoadedAttributeError(self.__dict__.get("explanation", name))

    def extra_repr(self) -> str:
        return "not loaded"


class AbsentParameter:
    """Stands in place of a parameter that the loaded parts leave out."""

    def __init__(self, explanation: str) -> None:
        self.explanation = explanation

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "explanation" not in self.__dict__:  # copy and pickle ask
            raise AttributeError(name)
        raise PartNotLoadedError(self.explanation)

    def __rmatmul__(self, other: Any) -> Any:  # states @ text_projection
        raise PartNotLoadedError(self.explanation)


def drop_absent(model: nn.Module, parts: str, family: Family = INTERNVL_14B) -> None:
    """Puts stand-ins where the composite holds what the parts leave out."""
    for name, _ in list(model.named_parameters(recurse=False)):
        if not needs(parts, family)(name):
            delattr(model, name)
            explanation = _explanation(name, [name], parts, family)
            object.__setattr__(model, name, AbsentParameter(explanation))
    _drop_below(model, "", parts, family)


def _drop_below(module: nn.Module, path: str, parts: str, family: Family) -> None:
    needed = needs(parts, family)
    for name, child in list(module.named_children()):
        place = canonical(f"{path}{name}.")
        weights = [canonical(place + weight) for weight, _ in child.named_parameters()]
        kept = [needed(weight) for weight in weights]
        if kept and not any(kept):
            explanation = _explanation(place.rstrip("."), weights, parts, family)
            setattr(module, name, AbsentModule(explanation, child))
        elif not all(kept):
            _drop_below(child, place, parts, family)
