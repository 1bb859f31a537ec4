"""Puts the fused modules into a model, says what it did, and takes them out again.

Modules are recognised by their structure (the names and shapes of what they hold), so our eager
model, copies of the published code and transformers' own InternViT and LLaMA are all served; one of
every foreign kind is tried whether it computes what its fused form does. Instances are replaced,
never classes; the loops, masks and caches around them stay.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .checkpoint.parts import AbsentModule
from .fused import (
    FusedAttentionPooling,
    FusedCrossAttention,
    FusedDecoderLayer,
    FusedLlamaAttention,
    FusedLlamaMLP,
    FusedModule,
    FusedPublishedAttention,
    FusedRMSNorm,
    FusedTransformersVisionLayer,
    FusedVisionLayer,
)
from .fused.projection import has_own_forward
from .fused.proof import Proofs
from .fused.qllama import Constants
from .fused.sharing import Handoff, Shared

# The first that claims a module gets it; what is inside a fused module is its own business.
FUSED: tuple[type[FusedModule], ...] = (
    FusedVisionLayer,
    FusedTransformersVisionLayer,
    FusedDecoderLayer,
    FusedAttentionPooling,
    FusedLlamaAttention,
    FusedPublishedAttention,
    FusedCrossAttention,
    FusedLlamaMLP,
    FusedRMSNorm,
)
Found = tuple[nn.Module, str, "Entry"]  # parent, attribute, what becomes of the module there
MODES = ("inference", "training")


@dataclass
class Entry:
    """One module that `accelerate` knows: where it is, what became of it, and why."""

    name: str
    kind: str
    fused: str | None
    reason: str = ""


@dataclass
class Report:
    """What `accelerate` did to a model; `print` it, or take it back with `undo()`."""

    mode: str
    entries: list[Entry] = field(default_factory=list)
    _replaced: list[tuple[nn.Module, str, FusedModule]] = field(default_factory=list, repr=False)

    @property
    def replaced(self) -> list[str]:
        """Names of the modules that are fused now."""
        return [entry.name for entry in self.entries if entry.fused]

    @property
    def kept(self) -> dict[str, str]:
        """Names of known modules that stayed eager, and the reasons."""
        return {entry.name: entry.reason for entry in self.entries if not entry.fused}

    def undo(self) -> None:
        """Puts the original modules back, with the bits of every weight as they were."""
        for parent, name, fused in reversed(self._replaced):
            eager = fused.release()
            if parent._modules.get(name) is fused:
                parent._modules[name] = eager
        self._replaced.clear()
        self.entries.clear()

    def __str__(self) -> str:
        lines = [f"accelerate: {len(self.replaced)} modules fused for {self.mode}"]
        groups: dict[tuple[str, str, str], int] = {}
        for entry in self.entries:
            key = (entry.kind, entry.fused or "kept", entry.reason)
            groups[key] = groups.get(key, 0) + 1
        for (kind, fused, reason), count in groups.items():
            lines.append(f"  {count:4} x {kind} -> {fused}" + (f": {reason}" if reason else ""))
        return "\n".join(lines)


def accelerate(
    model: nn.Module, mode: str = "inference", *, compile: bool = False, strict: bool = False
) -> Report:
    """Replaces the modules of a model that have a fused form, in place.

    Inference merges the weights of neighbouring products and packs them for the CPU, so that every
    weight exists once. Packed weights are constants: `state_dict()`, saving, copying and loading
    have them as ever, `parameters()` and what uses it (counts, `requires_grad_`, optimizers) do
    not. `train()` gives them back as parameters that are trained, `eval()` packs again, and
    whoever asks a Linear for its `weight` gets it. A parameter that somebody else holds at that
    time (a tied module, an optimizer, a list) is neither packed nor merged.

    Training leaves every parameter as it is. What a fused module cannot serve (attention
    probabilities, hooks inside it) its eager module computes. Calling it again changes nothing but
    the mode.

    What the first layer of QLLaMA makes of the query tokens is computed once and, when a weight of
    it is changed or replaced, anew. In-place edits behind autograd's back (`weight.data.copy_`) are
    not noticed: use `torch.no_grad()`, or call `accelerate` again.

    Args:
        model: any module: ours, the published one, one with an InternViT or a LLaMA inside.
        mode: "inference" or "training".
        compile: also compile every replaced layer with torch.compile (fullgraph, any batch size).
        strict: fail, and change nothing, where a known module would have to stay eager.

    Returns:
        A Report of every module that was replaced or kept, and why.

    Raises:
        ValueError: mode is unknown, the model itself has a fused form and no parent to be replaced
            in, or with strict, a known module cannot be replaced.
    """
    if mode not in MODES:
        raise ValueError(f"accelerate: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if any(kind.claims(model) for kind in FUSED):
        raise ValueError(
            f"accelerate: give the model around this {type(model).__name__}; a module is replaced "
            "in its parent"
        )
    found = list(_find(model, "", Proofs(), set()))
    report = Report(mode, [entry for _, _, entry in found])
    if strict and report.kept:
        name, reason = next(iter(report.kept.items()))
        raise ValueError(
            f"accelerate: {len(report.kept)} modules cannot be replaced; {name}: {reason}"
        )
    _replace(model, found, report, compile)
    _link(model)
    return report


def _replace(model: nn.Module, found: list[Found], report: Report, compile: bool) -> None:
    inference = report.mode == "inference"
    classes = {kind.__name__: kind for kind in FUSED}
    # A module may be in several places, and so is the one that is fused of it.
    fused_of = {m.eager: m for m in model.modules() if isinstance(m, FusedModule)}
    for parent, attribute, entry in found:
        child: Any = parent._modules[attribute]
        if isinstance(child, FusedModule):
            if child.inference != inference:
                child.set_inference(inference)
                entry.reason = f"already fused, for {report.mode} from now on"
        elif entry.fused:
            if child not in fused_of:
                fused = fused_of[child] = classes[entry.fused](child, inference)
                fused.prepare()
                if compile:
                    fused.compile(fullgraph=True, dynamic=True)
            parent._modules[attribute] = fused_of[child]
            report._replaced.append((parent, attribute, fused_of[child]))


def _find(parent: nn.Module, prefix: str, proofs: Proofs, seen: set[nn.Module]) -> Iterator[Found]:
    """(parent, attribute, Entry) of every known module below, outermost first."""
    for attribute, child in parent._modules.items():
        name = f"{prefix}{attribute}"
        if child is None or isinstance(child, AbsentModule):  # of a part that was not loaded
            continue
        if isinstance(child, FusedModule):
            kept = Entry(name, type(child.eager).__name__, type(child).__name__, "already fused")
            yield parent, attribute, kept
            continue
        kind = next((kind for kind in FUSED if kind.claims(child)), None)
        if kind is not None:
            fixed = _untouchable(parent, child)
            reason = fixed or proofs.objection(kind, child)
            fused = None if reason else kind.__name__
            yield parent, attribute, Entry(name, type(child).__name__, fused, reason or "")
            if fused or fixed:
                continue
        if child not in seen:
            seen.add(child)
            yield from _find(child, f"{name}.", proofs, seen)


def _untouchable(parent: nn.Module, module: nn.Module) -> str | None:
    if any(hasattr(m, "_hf_hook") for m in module.modules()):
        return "its weights are moved in and out by hooks (device_map)"
    if any(p.is_meta for p in module.parameters()):
        return "its weights are offloaded, or were never loaded"
    if any(has_own_forward(m) for m in module.modules()):
        return "its forward was replaced"
    if has_own_forward(parent):  # as of torch.compile's wrapper, which has the old one's bound
        return f"what calls it is not the forward of {type(parent).__name__}"
    return None


def _link(model: nn.Module) -> None:
    """Lets every layer leave the next one's norm, and layers share what is the same for all."""
    image, angles = Shared(), Shared()
    for loop in model.modules():
        if isinstance(loop, FusedDecoderLayer | FusedCrossAttention):
            loop.share_image(image)
        elif isinstance(loop, FusedLlamaAttention):
            loop.angles = angles
        for layers in (m for m in loop.children() if isinstance(m, nn.ModuleList)):
            _link_layers(list(layers), getattr(loop, "norm", None))
    tokens = getattr(model, "query_tokens", None)
    first = next((m for m in model.modules() if isinstance(m, FusedDecoderLayer)), None)
    if isinstance(tokens, torch.Tensor) and first is not None and first.layer_idx == 0:
        first.constants = Constants(model)


def _link_layers(layers: list[Any], last: Any) -> None:
    followers: list[Any] = [*layers[1:], None]
    for layer, following in zip(layers, followers, strict=True):
        norm = None
        if layers.count(layer) > 1:  # whom it precedes depends
            continue
        if isinstance(layer, FusedDecoderLayer) and isinstance(following, FusedDecoderLayer):
            norm = following.input_layernorm
        elif isinstance(layer, FusedVisionLayer) and isinstance(following, FusedVisionLayer):
            norm = getattr(following, following.NORMS[0])
        elif isinstance(layer, FusedDecoderLayer) and following is None:
            following = last
            norm = last.eager if isinstance(last, FusedRMSNorm) else None
        if norm is not None:
            handoff = Handoff(norm)
            layer.after = handoff
            if isinstance(following, FusedRMSNorm):
                following.handoff = handoff
            else:
                following.before = handoff
