"""Which tensor of the checkpoint goes where in the model; all that can be wrong is found here.

Only headers have been read by now, so that a damaged 28 GB checkpoint is refused at once.
"""

from torch import nn

from .contents import Contents, Stored
from .dtypes import FLOATS, dtype_name
from .errors import CheckpointError, listed
from .names import LORA, canonical


def match(model: nn.Module, contents: Contents, strict: bool, merged: bool) -> dict[str, str]:
    """The published name of every parameter and stored buffer of the model.

    Args:
        model: built on the meta device.
        contents: the checkpoint's tensors, by the names the model uses.
        strict: whether a tensor that the model has no place for is an error.
        merged: whether LoRA goes into the weights that it adapts.

    Raises:
        CheckpointError: a weight is missing, has another shape or is not of floating point, or
            there are weights of something else.
    """
    wanted = {name: canonical(name) for name in model.state_dict()}
    available = set(contents.tensors)
    for linear in contents.lora:
        available |= {f"{linear}.lora_A.weight", f"{linear}.lora_B.weight"}
    missing = [name for name in wanted.values() if name not in available]
    if missing:
        raise CheckpointError(_missing(contents, missing))
    if merged:
        available = set(contents.tensors)
    if strict and (unexpected := available - set(wanted.values())):
        raise CheckpointError(
            f"{contents.path}: {len(unexpected)} weights have no place in {type(model).__name__}: "
            f"{listed(unexpected)}; strict=False leaves them out"
        )
    _check_adapters(contents)
    problems = []
    for name, target in model.state_dict().items():
        problems += _problems(stored(contents, wanted[name]), tuple(target.shape))
    if problems:
        raise CheckpointError("\n".join(problems[:5]) + _beyond(len(problems) - 5))
    return wanted


def stored(contents: Contents, name: str) -> Stored:
    """The tensor of a published name, LoRA's included."""
    adapter = LORA.match(name)
    if adapter and adapter["linear"] in contents.lora:
        return contents.lora[adapter["linear"]][adapter["side"]]
    return contents.tensors[name]


def _missing(contents: Contents, missing: list[str]) -> str:
    text = f"{contents.path}: {len(missing)} weights are missing: {listed(missing)}"
    if any(".lora_" in name for name in missing):
        text += "; its LoRA adapts other linears than the published ones: pass merge_lora=True"
    if contents.parts:
        text += f"; the checkpoint holds parts {contents.parts!r}"
    return text


def _problems(entry: Stored, shape: tuple[int, ...]) -> list[str]:
    if entry.shape != shape:
        return [f"{entry}: needed shape {shape}, got {entry.shape}"]
    if entry.dtype not in FLOATS:
        kinds = ", ".join(map(dtype_name, FLOATS))
        return [f"{entry}: needed one of {kinds}, got {dtype_name(entry.dtype)}"]
    return []


def _check_adapters(contents: Contents) -> None:
    """B A must have the shape of the weight it is added to."""
    problems = []
    for linear, sides in contents.lora.items():
        weight = contents.tensors.get(f"{linear}.weight")
        if weight is None:
            problems.append(f"{sides['A']}: there is no weight {linear}.weight for it to adapt")
            continue
        rank = sides["A"].shape[0] if sides["A"].shape else 0
        rows, columns = weight.shape if len(weight.shape) == 2 else (0, 0)
        problems += _problems(sides["A"], (rank, columns)) + _problems(sides["B"], (rows, rank))
    if problems:
        raise CheckpointError("\n".join(problems[:5]) + _beyond(len(problems) - 5))


def _beyond(count: int) -> str:
    return f"\nand {count} more" if count > 0 else ""
