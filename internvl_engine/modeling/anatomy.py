"""The parts of a model by name: towers, what connects them, heads, and adapters on any of them.

Found by the attributes that the classes have in common, so that copies of the published code and
transformers' own chat model have the same parts as ours, with LoRA and without.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

CHAT, INTERNVL_14B, BRIDGE = "a chat model", "an InternVL-14B", "a query bridge"
VISION = ("vision_model", "vision_tower")
# Of DDP, of torch.compile, and of transformers, which keeps the towers one level deeper.
WRAPPERS = ("module", "_orig_mod", "model")
PROJECTORS = ("mlp1", "multi_modal_projector", "projector")
POOLERS = ("clip_projector", "clip_projector2", "pooler")
HEADS = ("text_projection", "itm_head", "logit_scale")


@dataclass
class Part:
    """A part of a model: its parameters by name."""

    name: str
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)


@dataclass
class Anatomy:
    """What a model consists of.

    Args:
        kind: what messages call the model.
        vision, language: the towers; None where the model has none.
        parts: every parameter of the model, in one part each: that of its narrowest name.
        adapters: those of peft's adapters (LoRA, prompts, modules_to_save), which no other part
            has, by the name of the part that they are in; `idle` are the ones that are not active.
        layers: the layers of the vision tower, in order.
        tied: whether the LM head is the token embedding.
    """

    kind: str
    vision: Any
    language: Any
    parts: dict[str, Part]
    adapters: dict[str, Part]
    idle: set[int]
    layers: list[nn.Module]
    tied: bool

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of the model, each once."""
        for part in (*self.parts.values(), *self.adapters.values()):
            yield from part.parameters.values()


def bare(module: Any) -> Any:
    """A module out of peft's wrapper, or itself."""
    return module.get_base_model() if hasattr(module, "get_base_model") else module


def anatomy(model: Any) -> Anatomy:
    """The parts of a model.

    Raises:
        TypeError: it has neither the towers of a chat model nor those of an InternVL-14B.
    """
    outer = body = bare(model)
    while not any(_held(body, name) is not None for name in (*VISION, "qllama")):
        inner = bare(_first(body, WRAPPERS))
        if inner is None:
            break
        outer, body = body, inner
    kind, language = _kind(body)
    vision = _first(body, VISION)
    if not isinstance(language, nn.Module) or (vision is None and kind != BRIDGE):
        raise TypeError(
            "freeze: needed a chat model (vision_model, mlp1, language_model), an InternVL-14B "
            f"(vision_model, qllama) or a QueryBridge, got {type(model).__name__}"
        )
    head = _embeddings(language, "output") or _embeddings(outer, "output")
    words = _embeddings(language, "input")
    owners: list[tuple[str, Iterable[Any]]] = [
        ("lm_head", [head]),
        ("embeddings", [words]),
        ("cross_attention", _cross_attention(language)),
        ("queries", [_held(body, "query_tokens")]),
        ("poolers", [_held(body, name) for name in POOLERS]),
        ("heads", [_held(body, name) for name in HEADS]),
        ("projector", [_held(body, name) for name in PROJECTORS]),
        ("vision", [vision]),
        ("language", [language]),
        ("other", [model]),
    ]
    names = {id(p): name for name, p in model.named_parameters()}
    found = _adapters(model)
    parts, adapters = _sort(owners, names, found)
    encoder = _held(bare(vision), "encoder")
    layers = _first(encoder, ("layers", "layer"))
    tied = head is not None and getattr(head, "weight", None) is getattr(words, "weight", False)
    idle = {key for key, active in found.items() if not active}
    return Anatomy(kind, vision, language, parts, adapters, idle, list(layers or ()), tied)


def _kind(body: Any) -> tuple[str, Any]:
    """What a model is, and its language tower."""
    qllama = _held(body, "qllama")
    if qllama is None:
        return CHAT, _held(body, "language_model")
    return BRIDGE if _first(body, VISION) is None else INTERNVL_14B, qllama


def _held(module: Any, name: str) -> Any:
    """A submodule or parameter that a module itself holds; None where it does not."""
    if not isinstance(module, nn.Module):
        return None
    found = module._modules.get(name)
    return module._parameters.get(name) if found is None else found


def _first(module: Any, names: Iterable[str]) -> Any:
    return next((found for name in names if (found := _held(module, name)) is not None), None)


def _embeddings(module: Any, side: str) -> Any:
    try:
        return getattr(bare(module), f"get_{side}_embeddings")()
    except (AttributeError, NotImplementedError):  # a trunk without a head, a part not loaded
        return None


def _cross_attention(language: nn.Module) -> list[nn.Module]:
    return [m for name, m in language.named_modules() if name.rpartition(".")[2] == "cross_attn"]


def _adapters(model: nn.Module) -> dict[int, bool]:
    """The parameters that belong to adapters: their ids, and whether the adapter is active."""
    found: dict[int, bool] = {}
    module: Any
    for module in model.modules():
        kinds: Any = tuple(getattr(module, "adapter_layer_names", ()))
        kinds += tuple(n for n in ("modules_to_save", "prompt_encoder") if n in module._modules)
        if "original_module" in module._modules:  # a copy of it stands in for it
            found |= {id(p): False for p in module.original_module.parameters()}
        for kind in kinds:
            for adapter, held in getattr(module, kind, {}).items():
                for parameter in _parameters(held):
                    found[id(parameter)] = adapter in module.active_adapters
    return found


def _parameters(held: Any) -> Iterator[nn.Parameter]:
    if isinstance(held, nn.Module):
        yield from held.parameters()
    elif isinstance(held, Tensor):
        yield held  # type: ignore[misc]


def _sort(
    owners: list[tuple[str, Iterable[Any]]], names: dict[int, str], adapters: dict[int, bool]
) -> tuple[dict[str, Part], dict[str, Part]]:
    """Gives every parameter to the first owner that has it."""
    parts: dict[str, Part] = {}
    adapted: dict[str, Part] = {}
    taken: set[int] = set()
    for name, holders in owners:
        for holder in holders:
            for parameter in _parameters(holder):
                if id(parameter) in taken or id(parameter) not in names:
                    continue
                taken.add(id(parameter))
                table = adapted if id(parameter) in adapters else parts
                part = table.setdefault(name, Part(name))
                part.parameters[names[id(parameter)]] = parameter
    return parts, adapted
