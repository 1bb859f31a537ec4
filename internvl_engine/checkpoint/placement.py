"""Spreading a model over devices, and over memory and disk where they do not suffice.

A block is what lies in one place: a layer, a pooler, an embedding, a norm, a head. The model's own
parameters (query tokens, text projection, logit scale) lie on the main device, where inputs arrive
and where the outputs of single blocks meet.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
SPARE = 0.1  # of a GPU, for activations
AUTOMATIC = ("auto", "balanced", "sequential")
DISK = "disk"


@dataclass
class Placement:
    """Where every block of a model lies.

    Args:
        main: the device of the model's own parameters, of inputs and of outputs.
        blocks: block to device, "cpu" or "disk"; empty where everything is on main.
    """

    main: torch.device
    blocks: dict[str, Any] = field(default_factory=dict)

    def of(self, name: str) -> tuple[torch.device, str | None]:
        """The device that uses a parameter, and "cpu" or "disk" where it is kept until then."""
        block = next((b for b in self.blocks if name.startswith(f"{b}.")), None)
        place = self.main if block is None else self.blocks[block]
        if place == DISK:
            return self.main, DISK
        if torch.device(place).type == "cpu" and self.main.type != "cpu":
            return self.main, "cpu"
        return torch.device(place), None


def blocks(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The blocks below a model: topmost modules that must not be split or have own parameters."""
    whole = set(getattr(model, "_no_split_modules", None) or ())
    yield from _blocks(model, path, whole)


def _blocks(module: nn.Module, path: str, whole: set[str]) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        own = next(child.parameters(recurse=False), None) is not None
        if own or type(child).__name__ in whole:
            yield path + name, child
        else:
            yield from _blocks(child, f"{path}{name}.", whole)


def place(
    model: nn.Module,
    device: Any,
    device_map: Any,
    max_memory: Mapping[Any, int | str] | None,
    dtype: Any,
) -> Placement:
    """Decides where the blocks of a model on the meta device will lie.

    Args:
        device: everything on one device; None is the CPU.
        device_map: None; a device; "auto", "balanced" or "sequential"; or module names to devices,
            "cpu" or "disk".
        max_memory: device number, "cpu" or "disk" to bytes or "20GiB"; for the automatic ones.
        dtype: of the weights, as resolve_dtype takes it.

    Raises:
        ValueError: device and device_map contradict, a map leaves weights out or splits a block.
    """
    if device_map is None or not isinstance(device_map, dict | str) or _is_device(device_map):
        if device is not None and device_map is not None:
            raise ValueError("give either device or device_map")
        chosen = device if device_map is None else device_map
        return Placement(torch.device("cpu" if chosen is None else _device(chosen)))
    if device is not None:
        raise ValueError("give either device or device_map")
    if isinstance(device_map, str):
        if device_map not in AUTOMATIC:
            raise ValueError(
                f"device_map must be a dict, a device or one of {', '.join(AUTOMATIC)}, "
                f"got {device_map!r}"
            )
        return _automatic(model, device_map, max_memory, dtype)
    return _given(model, device_map)


def _is_device(value: Any) -> bool:
    return isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda", "xpu", "mps", "meta")


def _device(value: Any) -> torch.device:
    return torch.device("cuda", value) if isinstance(value, int) else torch.device(value)


def _given(model: nn.Module, device_map: dict[str, Any]) -> Placement:
    chosen = {}
    for name, block in blocks(model):
        places = {_lookup(device_map, f"{name}.{weight}") for weight, _ in block.named_parameters()}
        if None in places:
            raise ValueError(f"device_map: no entry for {name}; an entry '' would serve the rest")
        if len(places) > 1:
            raise ValueError(f"device_map: {name} must be in one place, got {_join(places)}")
        chosen[name] = places.pop()
    used = [torch.device(p) for p in chosen.values() if p != DISK]
    main = next((d for d in used if d.type != "cpu"), torch.device("cpu"))
    return Placement(main, chosen)


def _lookup(device_map: dict[str, Any], name: str) -> Any:
    fitting = [key for key in device_map if key == "" or f"{name}.".startswith(f"{key}.")]
    if not fitting:
        return None
    value = device_map[max(fitting, key=len)]
    return DISK if value == DISK else _device(value)


def _join(places: set) -> str:
    return " and ".join(sorted(map(str, places)))


def _automatic(
    model: nn.Module, kind: str, max_memory: Mapping[Any, int | str] | None, dtype: Any
) -> Placement:
    """Fills the GPUs, then memory, then disk; the ends of the model first, as they meet on main."""
    from .dtypes import resolve_dtype

    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    main = gpus[0] if gpus else torch.device("cpu")
    width = resolve_dtype(dtype, main).itemsize
    sizes = {
        name: sum(p.numel() for p in block.parameters()) * width for name, block in blocks(model)
    }
    budgets = _budgets(gpus, max_memory)
    if kind != "sequential" and len(gpus) > 1:
        share = sum(sizes.values()) / len(gpus) * 1.05
        for gpu in gpus[:-1]:
            budgets[gpu] = min(budgets[gpu], share)
    order = sorted(sizes, key=lambda name: in_stack(model, name))  # stable: layers keep their order
    chosen = dict.fromkeys(order, DISK)
    places = list(budgets)
    for name in order:
        while places and budgets[places[0]] < sizes[name]:
            places.pop(0)
        if not places:
            break
        chosen[name] = places[0]
        budgets[places[0]] -= sizes[name]
    if set(chosen.values()) == {main}:
        return Placement(main)
    return Placement(main, chosen)


def in_stack(model: nn.Module, name: str) -> bool:
    """Whether a block is one of a list of layers."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ModuleList)


def _budgets(gpus: list[torch.device], given: Mapping[Any, int | str] | None) -> dict[Any, float]:
    if given is None:
        budgets: dict[Any, float] = {
            gpu: torch.cuda.mem_get_info(gpu)[0] * (1 - SPARE) for gpu in gpus
        }
        # On the CPU weights are mapped from their files: they take memory only while it is free.
        return budgets | {torch.device("cpu"): float("inf")}
    budgets = {}
    for name, size in given.items():
        if name != DISK:
            budgets[_device(name)] = parse_size(size)
    return dict(sorted(budgets.items(), key=lambda item: item[0].type == "cpu"))


def parse_size(size: int | str) -> int:
    """Bytes of "20GiB", "500MB" or a number.

    Raises:
        ValueError: it is no size.
    """
    match = re.fullmatch(r"\s*([\d.]+)\s*([KMG]I?)?B?\s*", str(size).upper())
    if not match:
        raise ValueError(f"max_memory: needed bytes or a size as '20GiB', got {size!r}")
    return int(float(match[1]) * UNITS[match[2] or ""])
