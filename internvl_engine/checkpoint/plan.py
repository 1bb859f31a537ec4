"""Which tensor of the checkpoint goes where in the model; all that can be wrong is found here.

Only headers have been read by now, so that a damaged 28 GB checkpoint is refused at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .contents import Contents
from .dtypes import FLOATS, dtype_name
from .entries import Entry, Quantized, Stored
from .errors import CheckpointError, listed
from .experts import fuse_experts
from .names import LORA, canonical
from .ties import heads


class Reader:
    """Reads weights by their published names, merging LoRA where asked to.

        merged = W + alpha / r * B A        in float32, rounded once

    Args:
        contents: the checkpoint.
        merge: whether LoRA is folded into the weights it adapts.
        alphas: beginning of a name to alpha; None is 2 * r.
    """

    def __init__(
        self,
        contents: Contents,
        merge: bool = False,
        alphas: Mapping[str, float | None] | None = None,
    ) -> None:
        self.contents = contents
        self.merge = merge
        self.alphas = dict(alphas or {})

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The weight for a dtype, in its form; mapped where nothing had to be computed."""
        entry = self.contents.entry(name)
        if isinstance(entry, Quantized):
            return entry.read(dtype)
        tensor = entry.read()
        sides = self._adapter(name)
        if sides is not None:
            tensor = self._merged(name, tensor, sides)
            dtype = dtype or entry.dtype
        return tensor if dtype is None else tensor.to(dtype)

    def is_mapped(self, name: str, dtype: torch.dtype) -> bool:
        """Whether the weight in that dtype is pages of its file, and takes no memory."""
        entry = self.contents.entry(name)
        if isinstance(entry, Quantized):
            return True
        return isinstance(entry, Stored) and entry.dtype == dtype and self._adapter(name) is None

    def _adapter(self, name: str) -> dict[str, Entry] | None:
        if not self.merge or not name.endswith(".weight"):
            return None
        return self.contents.lora.get(name.removesuffix(".weight"))

    def _merged(self, name: str, weight: Tensor, sides: dict[str, Entry]) -> Tensor:
        a, b = sides["A"].read().float(), sides["B"].read().float()
        alpha = next((v for start, v in self.alphas.items() if name.startswith(start)), None)
        rank = a.shape[0]
        scale = (2 * rank if alpha is None else alpha) / rank
        # Into the product, so that no third matrix of this size exists.
        return torch.addmm(weight.float(), b, a, alpha=scale)


@dataclass
class Plan:
    """Where the weights of a model come from.

    Args:
        names: name in the model to published name.
        contents: the checkpoint.
        reader: reads it.
        patch_size: side of a patch in pixels; None for a decoder.
        resize: side in pixels to which the position table is resized once it is there.
        tied: name of a weight to that of the one that it is, because the checkpoint has one tensor
            for both: an output embedding and the input embedding, lora_A of q, k and v.
    """

    names: dict[str, str]
    contents: Contents
    reader: Reader
    patch_size: int | None = None
    resize: int | None = None
    tied: dict[str, str] = field(default_factory=dict)

    def entry(self, name: str) -> Entry:
        """The stored tensor of a weight, by its name in the model."""
        return self.contents.entry(self.names[name])

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A weight by its name in the model; mapped where it is stored in that dtype, or None."""
        return self.reader.read(self.names[name], dtype)

    def is_mapped(self, name: str, dtype: torch.dtype) -> bool:
        """Whether `read` gives pages of the checkpoint's file."""
        return self.reader.is_mapped(self.names[name], dtype)


def match(
    model: nn.Module, contents: Contents, strict: bool, merged: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """Finds every parameter and stored buffer of the model in the checkpoint.

    Args:
        model: built on the meta device.
        contents: the checkpoint's tensors, by the names the model uses.
        strict: whether a tensor that the model has no place for is an error.
        merged: whether LoRA goes into the weights that it adapts.

    Returns:
        Name in the model to published name, and `tied` as in `Plan`.

    Raises:
        CheckpointError: a weight is missing, has another shape or is not of floating point, or
            there are weights of something else.
    """
    state = model.state_dict()
    wanted = {name: canonical(name) for name in state}
    fuse_experts(contents, wanted.values())
    available = set(contents.tensors)
    tied = {
        each.head: each.embedding
        for each in heads(model)
        if wanted[each.head] not in available and wanted[each.embedding] in available
    }
    for head in tied:
        del wanted[head]
    adapted = {f"{linear}.lora_{side}.weight" for linear in contents.lora for side in "AB"}
    missing = [name for name in wanted.values() if name not in available | adapted]
    if missing:
        raise CheckpointError(_missing(contents, missing))
    if not merged:
        available |= adapted
    if strict and (unexpected := available - set(wanted.values())):
        raise CheckpointError(
            f"{contents.path}: {len(unexpected)} weights have no place in {type(model).__name__}: "
            f"{listed(unexpected)}; strict=False leaves them out"
        )
    problems = _adapter_problems(contents, merged)
    if not problems:
        for name, published in wanted.items():
            problems += _problems(contents, published, tuple(state[name].shape))
    if problems:
        raise CheckpointError("\n".join(problems[:5]) + _beyond(len(problems) - 5))
    tied |= _shared(wanted, contents)
    return {name: own for name, own in wanted.items() if name not in tied}, tied


def _shared(wanted: Mapping[str, str], contents: Contents) -> dict[str, str]:
    """LoRA matrices that are one tensor in the checkpoint: later name to the first.

    One tensor in the model too, so that its gradient is that of the published parameter.
    """
    first: dict[Entry, str] = {}
    found = {name: contents.entry(own) for name, own in wanted.items() if LORA.match(own)}
    return {
        name: first[entry] for name, entry in found.items() if first.setdefault(entry, name) != name
    }


def _missing(contents: Contents, missing: list[str]) -> str:
    text = f"{contents.path}: {len(missing)} weights are missing: {listed(missing)}"
    if contents.layout is not None:
        text += f"; its names are those of {contents.layout.name}"
    if any(".lora_" in name for name in missing):
        text += "; its LoRA adapts other linears than the published ones: pass merge_lora=True"
    if any("_flat_param" in name for name in contents.names):
        text += (
            "; it holds FSDP's flattened parameters: save a full state dict (StateDictType."
            "FULL_STATE_DICT)"
        )
    if any(name.startswith("mlp1.") for name in missing) and "mlp1.1.weight" not in contents.names:
        text += (
            "; it has no projector (mlp1): VisionLanguageModel.from_parts(vision=..., language=..."
            ") starts a new one"
        )
    if contents.parts:
        text += f"; the checkpoint holds parts {contents.parts!r}"
    return text


def _problems(contents: Contents, name: str, shape: tuple[int, ...]) -> list[str]:
    """Why a stored tensor cannot be a weight of a shape."""
    entry = contents.entry(name)
    if isinstance(entry, Quantized):
        try:
            contents.tensors[name] = entry.fitted(shape)
        except CheckpointError as error:
            return [str(error)]
        return []
    return _misfits(entry, shape)


def _misfits(entry: Entry, shape: tuple[int, ...]) -> list[str]:
    if entry.shape != shape:
        return [f"{entry}: needed shape {shape}, got {entry.shape}"]
    if entry.dtype not in FLOATS:
        kinds = ", ".join(map(dtype_name, FLOATS))
        return [f"{entry}: needed one of {kinds}, got {dtype_name(entry.dtype)}"]
    return []


def _adapter_problems(contents: Contents, merged: bool) -> list[str]:
    """B A must have the shape of the weight it is added to."""
    problems = []
    for linear, sides in contents.lora.items():
        weight = contents.tensors.get(f"{linear}.weight")
        if weight is None:
            problems.append(f"{sides['A']}: there is no weight {linear}.weight for it to adapt")
            continue
        if isinstance(weight, Quantized):
            if merged:
                problems.append(
                    f"{weight}: LoRA cannot be merged into a quantized weight: leave merge_lora "
                    "out, or merge it where the checkpoint is quantized"
                )
            continue
        rank = sides["A"].shape[0] if sides["A"].shape else 0
        rows, columns = weight.shape if len(weight.shape) == 2 else (0, 0)
        problems += _misfits(sides["A"], (rank, columns)) + _misfits(sides["B"], (rows, rank))
    return problems


def _beyond(count: int) -> str:
    return f"\nand {count} more" if count > 0 else ""
