"""Parts of the composite: which weights each use needs, and what stands in place of the rest.

image     vision tower and its pooler: the C embedding of images
text      QLLaMA as a plain LLaMA, without head and cross-attention: embeddings of texts
c         image, text and the logit scale: everything of InternVL-C
g         c, query tokens, cross-attention and the second pooler: everything of InternVL-G
caption   vision tower, query tokens and all of QLLaMA: captions and answers
all       the whole model
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from .names import canonical

_VISION = r"vision_model\."
_POOLER = r"clip_projector\."
_TEXT = r"qllama\.model\.(?!layers\.\d+\.cross_attn\.)"
_PROJECTION = r"text_projection$"
_C = (_VISION, _POOLER, _TEXT, _PROJECTION, r"logit_scale$")
_PATTERNS = {
    "image": (_VISION, _POOLER),
    "text": (_TEXT, _PROJECTION),
    "c": _C,
    "g": (*_C, r"qllama\.model\.", r"query_tokens$", r"clip_projector2\."),
    "caption": (_VISION, r"qllama\.", r"query_tokens$"),
    "all": ("",),
}
PARTS = tuple(_PATTERNS)  # the smallest first


def needs(parts: str) -> Callable[[str], bool]:
    """Whether the parts need a weight, by its published name.

    Raises:
        ValueError: there are no such parts.
    """
    if parts not in _PATTERNS:
        raise ValueError(f"parts must be one of {', '.join(PARTS)}, got {parts!r}")
    pattern = re.compile("|".join(_PATTERNS[parts]))
    return lambda name: pattern.match(name) is not None


def parts_with(names: Iterable[str]) -> list[str]:
    """The parts that hold any of the weights of these published names."""
    names = list(names)
    return [parts for parts in PARTS if any(map(needs(parts), names))]


class PartNotLoadedError(RuntimeError):
    """A use of something that the loaded parts leave out."""


class PartNotLoadedAttributeError(PartNotLoadedError, AttributeError):
    """The same where an attribute was asked for: `hasattr` says no."""


def _explanation(name: str, weights: Iterable[str], parts: str) -> str:
    others = " or ".join(map(repr, parts_with(weights)))
    return (
        f"this model was loaded with parts={parts!r}, which leave {name} out; what you asked for "
        f"needs it: load with parts={others}"
    )


class AbsentModule(nn.Module):
    """Stands in place of a module that the loaded parts leave out; it holds nothing."""

    def __init__(self, name: str, weights: Iterable[str], parts: str, replaced: nn.Module) -> None:
        super().__init__()
        self.explanation = _explanation(name, weights, parts)
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

    def __init__(self, name: str, parts: str) -> None:
        self.explanation = _explanation(name, [name], parts)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "explanation" not in self.__dict__:  # copy and pickle ask
            raise AttributeError(name)
        raise PartNotLoadedError(self.explanation)

    def __rmatmul__(self, other: Any) -> Any:  # states @ text_projection
        raise PartNotLoadedError(self.explanation)


def drop_absent(model: nn.Module, parts: str) -> None:
    """Puts stand-ins where the composite holds what the parts leave out."""
    needed = needs(parts)
    for name, _ in list(model.named_parameters(recurse=False)):
        if not needed(name):
            delattr(model, name)
            object.__setattr__(model, name, AbsentParameter(name, parts))
    _drop_below(model, "", needed, parts)


def _drop_below(module: nn.Module, path: str, needed: Callable[[str], bool], parts: str) -> None:
    for name, child in list(module.named_children()):
        place = canonical(f"{path}{name}.")
        weights = [canonical(place + weight) for weight, _ in child.named_parameters()]
        kept = [needed(weight) for weight in weights]
        if kept and not any(kept):
            setattr(module, name, AbsentModule(place.rstrip("."), weights, parts, child))
        elif not all(kept):
            _drop_below(child, place, needed, parts)
