"""Which parts of a model train: `freeze` sets it, and says what it set.

Sources: OpenGVLab/InternVL, internvl_chat_finetune.py (its switch for the LM head changed nothing)
and internvl_stage2_finetune.py.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from .anatomy import BRIDGE, CHAT, INTERNVL_14B, Anatomy, Part, anatomy
from .frozen_parts import Freezing, Row

__all__ = ["Freezing", "freeze"]

# Rows of the table, in the order of the computation.
ROWS = ("vision", "queries", "cross_attention", "projector", "embeddings", "language", "lm_head",
        "poolers", "heads", "other")  # fmt: skip
# Parts of the language model that can train while the rest of it is frozen.
WITHIN_LANGUAGE = ("cross_attention", "embeddings", "lm_head")
# What only some models have.
NEEDS = {
    "cross_attention": (INTERNVL_14B, BRIDGE),
    "queries": (INTERNVL_14B, BRIDGE),
    "poolers": (INTERNVL_14B, BRIDGE),
    "heads": (INTERNVL_14B,),
}
RESTING = {CHAT: ("language",), INTERNVL_14B: ("vision", "language"), BRIDGE: ("language",)}


def freeze(
    model: nn.Module,
    vision: bool = True,
    language: bool = True,
    projector: bool = False,
    last_vision_layers: int = 0,
    lm_head: bool = False,
    embeddings: bool = False,
    cross_attention: bool | None = None,
    queries: bool | None = None,
    poolers: bool | None = None,
    heads: bool | None = None,
    *,
    adapters: bool = True,
) -> Freezing:
    """Sets which parameters of a model train, all of them, and returns a table of it.

    The first three say what is *frozen*; the others what *trains*, also inside a frozen tower.
    Nothing of an earlier call remains. A frozen parameter also loses its gradient, by which an
    optimizer would go on moving it.

    A frozen language model, and both towers of InternVL-14B, are put into eval mode as in the
    published scripts, which switches off dropout, drop path and the recomputation of layers
    (gradient checkpointing); layers and adapters that train keep their mode. `model.train()`, which
    trainers call, undoes that: what is frozen stays frozen, but computes as in training. The
    vision tower of a chat model keeps its mode, drop path included; `model.vision_model.eval()`
    switches that off.

    Args:
        model: a chat model (ours, transformers', the published one), an InternVL-14B, or a
            QueryBridge; with adapters, and accelerated, too.
        vision: freeze the vision tower. False trains all of it, also what LoRA adapts.
        language: freeze the language model, embeddings and LM head included. False likewise.
        projector: freeze what connects the two: `mlp1` of a chat model.
        last_vision_layers: so many of the last layers of the vision tower train.
        lm_head: the LM head trains. Where it is tied, these are the embeddings too.
        embeddings: the token embeddings train. Where they are tied, these are the LM head too.
        cross_attention: QLLaMA's cross-attention trains; None is as the language model.
        queries: the query tokens train; None is True.
        poolers: the attention poolers train; None is True.
        heads: text projection, matching head and logit scale train; None is True.
        adapters: active adapters (LoRA) train, on whatever tower they are.

    Returns:
        A Freezing: counts of every part.

    Raises:
        TypeError: the model has no such parts at all, or an argument is no bool or no int.
        ValueError: an argument names what this model does not have or cannot train. Nothing was
            changed.
    """
    trains = {
        "lm_head": lm_head, "embeddings": embeddings, "cross_attention": cross_attention,
        "queries": queries, "poolers": poolers, "heads": heads,
    }  # fmt: skip
    whole = {"vision": vision, "language": language, "projector": projector, "adapters": adapters}
    _check_types(whole | trains, last_vision_layers)
    found = anatomy(model)
    _check_parts(found, projector, trains)
    wanted = {part: not frozen for part, frozen in whole.items()}
    wanted |= {part: bool(value) for part, value in trains.items()}
    wanted |= {part: trains[part] is not False for part in ("queries", "poolers", "heads")}
    for part in WITHIN_LANGUAGE:
        wanted[part] = wanted["language"] or wanted[part]
    flags = _flags(found, wanted, adapters, _last_layers(found, last_vision_layers))
    _check_dtypes(found, flags)
    for parameter in found.parameters():
        if id(parameter) in flags:
            parameter.requires_grad_(flags[id(parameter)])
            if not flags[id(parameter)]:
                parameter.grad = None
    for name in RESTING[found.kind]:
        if whole[name] and getattr(found, name) is not None:
            _rest(getattr(found, name), found.layers[len(found.layers) - last_vision_layers :])
    return Freezing(tuple(_rows(found)), tuple(_notes(model, found, last_vision_layers, trains)))


def _check_types(switches: dict[str, Any], last_vision_layers: Any) -> None:
    for name, value in switches.items():
        if not isinstance(value, bool | None):
            raise TypeError(f"freeze: {name} must be True or False, got {value!r}")
    if isinstance(last_vision_layers, bool) or not isinstance(last_vision_layers, int):
        raise TypeError(
            f"freeze: last_vision_layers must be a number of layers, got {last_vision_layers!r}"
        )


def _check_parts(found: Anatomy, projector: bool, trains: dict[str, bool | None]) -> None:
    """Raises where an argument names a part that the model does not have."""
    for name, kinds in NEEDS.items():
        if trains[name] is not None and found.kind not in kinds:
            raise ValueError(
                f"freeze: {name} is a part of {' and of '.join(kinds)}; this is {found.kind}"
            )
    asked = [name for name in trains if trains[name]]
    asked += ["projector"] if projector else []
    held = {**found.parts, **found.adapters}
    tied = {"lm_head", "embeddings"} if found.tied else set()
    for name in asked:
        if name not in held and name not in tied:
            advice = "; its poolers and heads have arguments of their own"
            raise ValueError(
                f"freeze: this model ({found.kind}) has no {name}, or was loaded without it"
                + advice * (name == "projector")
            )


def _last_layers(found: Anatomy, count: int) -> set[int]:
    """The ids of the parameters of the last layers of the vision tower."""
    if not 0 <= count <= len(found.layers):
        raise ValueError(
            f"freeze: last_vision_layers must be from 0 to the {len(found.layers)} layers of the "
            f"vision tower, got {count}"
        )
    last = found.layers[len(found.layers) - count :]
    return {id(parameter) for layer in last for parameter in layer.parameters()}


def _flags(
    found: Anatomy, wanted: dict[str, bool], adapters: bool, last: set[int]
) -> dict[int, bool]:
    """Whether each parameter trains, by its id; those of no part keep what they are."""
    flags = {}
    for part in found.parts.values():
        if part.name == "other":
            continue
        trains = wanted[part.name]
        if found.tied and part.name in ("lm_head", "embeddings"):
            trains = wanted["lm_head"] or wanted["embeddings"]
        for parameter in part.parameters.values():
            flags[id(parameter)] = trains or (part.name == "vision" and id(parameter) in last)
    for part in found.adapters.values():
        for parameter in part.parameters.values():
            flags[id(parameter)] = adapters and id(parameter) not in found.idle
    return flags


def _check_dtypes(found: Anatomy, flags: dict[int, bool]) -> None:
    for part in found.parts.values():
        for name, parameter in part.parameters.items():
            can_train = parameter.is_floating_point() or parameter.is_complex()
            if flags.get(id(parameter)) and not can_train:
                raise ValueError(
                    f"freeze: {name} is {parameter.dtype} (quantized) and cannot train; freeze "
                    f"{part.name} and put LoRA on it"
                )


def _rest(tower: nn.Module, layers: list[nn.Module]) -> None:
    """Puts a tower into eval mode, but for the layers that train and the dropout of adapters."""
    dropouts: list[Any] = [m for m in tower.modules() if "lora_dropout" in m._modules]
    still = [m for m in (*layers, *(each.lora_dropout for each in dropouts)) if m.training]
    tower.eval()
    for module in still:
        module.train()


def _rows(found: Anatomy) -> Iterator[Row]:
    for name in ROWS:
        tower = getattr(found, name) if name in ("vision", "language") else None
        if name in found.parts:
            mode = "" if tower is None else "train" if tower.training else "eval"
            yield Row(name, *_count(found.parts[name]), mode)
        if name in found.adapters:
            yield Row(f"{name} adapters", *_count(found.adapters[name]))


def _count(part: Part) -> tuple[int, int]:
    """How many values of a part train, and how many do not."""
    trains = sum(p.numel() for p in part.parameters.values() if p.requires_grad)
    return trains, sum(p.numel() for p in part.parameters.values()) - trains


def _notes(
    model: Any, found: Anatomy, last_vision_layers: int, trains: dict[str, bool | None]
) -> Iterator[str]:
    if found.tied:
        both = bool(trains["lm_head"] or trains["embeddings"])
        yield "lm_head and embeddings are one tensor (tied)" + ": both train" * both
    select = getattr(getattr(model, "config", None), "select_layer", -1)
    unused = -1 - select if isinstance(select, int) and select < 0 else 0
    if last_vision_layers and unused:
        yield f"the last {unused} vision layers are not read (select_layer {select})"
