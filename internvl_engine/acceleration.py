"""Puts the fused computations into a model, says what it did, and takes them out again.

Modules are recognised by a table of classes and by structure (recognition/): ours, copies
of the published code and transformers' InternViT and LLaMA are served. Every module stays the
object that it is (fused/base.py); foreign loops, masks and caches stay what they are.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .checkpoint.parts import AbsentModule
from .fused import FusedModule
from .quantization import Quantization, Run, Scheme, Source, Undone, WeightEntry, scheme_of, widen
from .quantization import quantize as quantize_weights
from .recognition import LAYERS, LOOPS, Recognition, is_expected
from .weights import QuantizedTensor, has_own_forward

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
    tied: list[str] = field(default_factory=list)
    quantization: Quantization | None = None
    forms: dict[str, int] = field(default_factory=dict)  # of weights that were quantized before
    _fused: list[FusedModule] = field(default_factory=list, repr=False)
    _model: nn.Module | None = field(default=None, repr=False)

    @property
    def replaced(self) -> list[str]:
        """Names of the modules that are fused now."""
        return [entry.name for entry in self.entries if entry.fused]

    @property
    def kept(self) -> dict[str, str]:
        """Names of known modules that stayed eager, and the reasons."""
        return {entry.name: entry.reason for entry in self.entries if not entry.fused}

    @property
    def weights(self) -> list[WeightEntry]:
        """Of every parameter its form, bytes before and after, and why it stayed wide; empty where
        nothing was to be quantized."""
        return self.quantization.weights if self.quantization is not None else []

    def undo(self, source: Source = None) -> None:
        """Makes every module that this call fused eager again, with the bits of every weight as
        they were.

        The wide bits of quantized weights are read again from the checkpoint that the model came
        from, or from `source` (a checkpoint or a state dict). A weight that is not there as it was
        when it was quantized, or that was written to since, gets the values of its form, with a
        warning that counts them. Weights that were quantized before this call, or as they were
        loaded, stay so, with a warning; those that `source` has become wide too.
        """
        self._take_back(source).warn(stacklevel=2)

    def _take_back(self, source: Source = None) -> Undone:
        for module in reversed(self._fused):
            if isinstance(module, FusedModule):
                module.restore()
        self._fused.clear()
        self.entries.clear()
        if self.quantization is not None:
            undone = self.quantization.take_back(source)
        else:
            undone = Undone() if self._model is None else widen(self._model, [], [], source)
        self.quantization = self._model = None
        return undone

    def __str__(self) -> str:
        if not self.entries and self.quantization is None:
            return "accelerate: no module of this model is known"
        lines = [f"accelerate: {len(self.replaced)} modules fused for {self.mode}"]
        groups = Counter((entry.kind, entry.fused, entry.reason) for entry in self.entries)
        for (kind, fused, reason), count in groups.items():
            lines.append(
                f"  {count:4} x {kind} -> {fused or 'kept'}" + f": {reason}" * bool(reason)
            )
        if self.tied:
            lines.append(f"  tied, so neither packed nor merged: {', '.join(self.tied)}")
        if self.quantization is not None:
            lines.append(str(self.quantization))
        elif self.forms:
            counts = ", ".join(f"{count} x {form}" for form, count in self.forms.items())
            lines.append(f"  weights that are quantized already: {counts}")
        return "\n".join(lines)

    __repr__ = __str__


def accelerate(
    model: nn.Module,
    mode: str = "inference",
    *,
    quantize: str | Scheme | None = None,
    only_faster: bool = True,
    calibration: Run | Tensor | None = None,
    compile: bool = False,
    strict: bool = False,
    check: bool = False,
) -> Report:
    """Gives the modules of a model that have a fused form that form, in place.

    For inference the weights of neighbouring products are merged and, on the CPU, packed while a
    module is in evaluation; every weight exists once. All of them stay parameters of their modules:
    counts, optimizers, freezing, adapters, loading and saving find what they did. `train()` gives
    weights their plain form, `eval()` packs again. Training mode leaves every weight as it is: use
    it where parameters are views of a flat buffer that somebody else writes to.

    What a fused module cannot serve (attention probabilities, hooks inside it, parts that were
    replaced since) its eager computation serves. Calling it again changes nothing but the mode.

    Args:
        model: any module: ours, the published one, one with an InternViT or a LLaMA inside.
        mode: "inference" or "training".
        quantize: "int8", "int4" or "fp8", or a Scheme: hold the large weights of Linears and
            embeddings, of modules that are not known too, in that many bits. They are frozen, and
            stay so in `train()`; see quantization/.
        only_faster: leave weights wide where their form is slower on this device, as fp8 on a
            processor. False saves memory all the same.
        calibration: a function that runs the model on a few pictures and prompts, or pixel_values
            (B, 3, height, width): int4 weights are rounded for what their layers are given then.
        compile: also compile every fused layer with torch.compile (fullgraph, any batch size).
        strict: fail, and change nothing, where a known module would have to stay eager.
        check: compare the computations of known classes too, on random weights.

    Returns:
        A Report of every module that was fused or kept, and why.

    Raises:
        ValueError: mode or quantize is unknown, or with strict, a known module cannot be fused.
    """
    if mode not in MODES:
        raise ValueError(f"accelerate: mode must be one of {', '.join(MODES)}, got {mode!r}")
    scheme = None if quantize is None else scheme_of(quantize)
    found = list(_find(model, "", Recognition(check)))
    tied, names = _tied(model)
    held = Counter(p.FORM for p in model.parameters() if isinstance(p, QuantizedTensor))
    report = Report(mode, [entry for _, _, entry in found], names, forms=dict(held), _model=model)
    if strict and report.kept:
        name, reason = next(iter(report.kept.items()))
        raise ValueError(
            f"accelerate: {len(report.kept)} modules cannot be fused; {name}: {reason}"
        )
    try:
        if scheme is not None:
            report.quantization = quantize_weights(
                model, scheme, only_faster=only_faster, calibration=calibration,
                fused=_inside(found),
            )  # fmt: skip
            report.quantization.warn(stacklevel=2)
        for module, kind, entry in found:
            if isinstance(module, FusedModule):
                if module.set_inference(mode == "inference"):
                    entry.reason = f"already fused, for {mode} from now on"
            elif kind is not None and entry.fused:
                report._fused.append(module)
                kind.fuse(module, mode == "inference", tied)
                entry.reason = "; ".join(module.called())
            if (
                compile
                and isinstance(module, FusedModule)
                and type(module).fused_class not in LOOPS
            ):
                module.compile_fused(fullgraph=True, dynamic=True)
    except BaseException:
        undone = report._take_back()
        undone.left.clear()  # they were so before
        undone.warn(stacklevel=2)
        raise
    return report


Found = tuple[Any, type[FusedModule] | None, Entry]


def _inside(found: list[Found]) -> frozenset[int]:
    """The ids of all modules in those that are fused, or become so."""
    modules = (module for module, kind, entry in found if kind is not None and entry.fused)
    return frozenset(id(inner) for module in modules for inner in module.modules())


def _find(module: nn.Module, name: str, recognition: Recognition) -> Iterator[Found]:
    """Every known module and what it becomes; what is inside a fused layer is its own business."""
    if isinstance(module, AbsentModule):  # of a part that was not loaded
        return
    inside = True
    if isinstance(module, FusedModule):
        kind = type(module).fused_class
        yield module, kind, Entry(name, type(module).__name__, kind.__name__, "already fused")
        inside = kind in LOOPS
    else:
        kind = recognition.kind_of(module)
        fixed = None if kind is None else _untouchable(module)
        reason = None if kind is None else fixed or recognition.unsupported_reason(kind, module)
        if kind in LAYERS and (reason or _has_fused_parts(module)):
            pass  # its parts speak for themselves
        elif kind is not None:
            fused = None if reason else kind.__name__
            yield module, kind, Entry(name, type(module).__name__, fused, reason or "")
            inside = bool(kind in LOOPS or (reason and not fixed))
        elif is_expected(module):
            reason = "it does not hold what this class is known to hold"
            yield module, None, Entry(name, type(module).__name__, None, reason)
    if inside:
        for attribute, child in module._modules.items():
            if child is not None:
                yield from _find(child, f"{name}.{attribute}".lstrip("."), recognition)


def _has_fused_parts(module: nn.Module) -> bool:
    return any(isinstance(part, FusedModule) for part in module.modules())


def _untouchable(module: nn.Module) -> str | None:
    if any(hasattr(m, "_hf_hook") for m in module.modules()):
        return "its weights are moved in and out by hooks (device_map)"
    if any(p.is_meta for p in module.parameters()):
        return "its weights are offloaded, or were never loaded"
    if any(map(has_own_forward, module.modules())):
        return "its forward was replaced"
    return None


def _tied(model: nn.Module) -> tuple[frozenset[int], list[str]]:
    """The parameters that several modules use: their ids, and their names."""
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append(f"{name}.{attribute}")
    tied = {key: names for key, names in places.items() if len(names) > 1}
    return frozenset(tied), [" = ".join(names) for names in tied.values()]
