"""What checkpoints call the same tensor: every layout's names in terms of the published one.

published     vision_model.encoder.layers.0.attn.qkv.weight
LoRA (peft)   vision_model.base_model.model.encoder.layers.0.attn.qkv.base_layer.weight
              vision_model.base_model.model.encoder.layers.0.attn.qkv.lora_A.default.weight
trainers      module._orig_mod.vision_model.encoder.layers.0._fsdp_wrapped_module.attn.qkv.weight
standalone C  blocks.0.attn.qkv.weight      (internvl_c_13b_224px.pth)
one tower     encoder.layers.0.attn.qkv.weight

InternLM2     language_model.model.layers.0.attention.wqkv.weight

The rules themselves are in layouts.py.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .families import ROOTS
from .grouping import PIECES
from .layouts import LAYOUTS, LEFTOVERS, Layout

LORA = re.compile(r"^(?P<linear>.*)\.lora_(?P<side>[AB])\.weight$")

# What wrappers of modules put into names: torch.compile, FSDP, activation checkpointing, and
# DistributedDataParallel, DeepSpeed and AveragedModel. No published name has such a step.
_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\."
)
_PEFT = (
    (re.compile(r"(^|\.)base_model\.model\."), r"\1"),
    (re.compile(r"\.base_layer\.(weight|bias)$"), r".\1"),
    (re.compile(r"\.(lora_[AB])\.[^.]+\.weight$"), r".\1.weight"),
    (re.compile(r"\.modules_to_save\.[^.]+\."), "."),
)
# What a module of `modules_to_save` was before training; its copy is the weight.
_REPLACED = re.compile(r"\.original_module\.")


@dataclass
class Names:
    """The stored names of a checkpoint, translated.

    Args:
        stored: published name to the stored names whose tensors, row after row, are it.
        grouped: published name to "q", "k" or "v" where it is some rows of the stored tensor.
        leftovers: stored names that are known and of no use.
        doubled: pairs of stored names that mean the same tensor.
        layout: the layout the names are in; None is the published one.
        rivals: trainers' prefixes that as many names have: which is the model, nobody can tell.
    """

    stored: dict[str, tuple[str, ...]] = field(default_factory=dict)
    grouped: dict[str, str] = field(default_factory=dict)
    leftovers: list[str] = field(default_factory=list)
    doubled: list[tuple[str, str]] = field(default_factory=list)
    layout: Layout | None = None
    rivals: tuple[str, ...] = ()


def canonical(name: str) -> str:
    """A name without what peft puts into it; of a stored tensor, or of a model's parameter."""
    for pattern, replacement in _PEFT:
        name = pattern.sub(replacement, name)
    return name


def translate(names: Iterable[str]) -> Names:
    """Stored names by published name."""
    unwrapped = {name: canonical(_WRAPPERS.sub("", name)) for name in names}
    prefix, rivals = _prefix(unwrapped.values())
    plain = {name: short.removeprefix(prefix) for name, short in unwrapped.items()}
    layout = next((each for each in LAYOUTS if _is_in(each, plain.values())), None)
    result = Names(layout=layout, rivals=rivals)
    unused = LEFTOVERS if layout is None or layout.leftovers is None else (
        f"{LEFTOVERS}|{layout.leftovers}"
    )  # fmt: skip
    pieces: dict[str, dict[int, str]] = {}
    for name, short in plain.items():
        if re.search(unused, short) or _REPLACED.search(name):
            result.leftovers.append(name)
            continue
        for published, place, piece in _publish(short, layout):
            taken = pieces.setdefault(published, {})
            if place in taken:
                result.doubled.append((taken[place], name))
            taken[place] = name
            if piece is not None:
                result.grouped[published] = piece
    result.stored = {
        published: tuple(found[place] for place in sorted(found))
        for published, found in pieces.items()
    }
    return result


def _is_in(layout: Layout, names: Iterable[str]) -> bool:
    marks = re.compile(layout.marks)
    return any(marks.search(name) for name in names)


def _publish(name: str, layout: Layout | None) -> Iterator[tuple[str, int, str | None]]:
    """Published names, which piece of that tensor it is, and which rows of it that tensor is."""
    if layout is None:
        yield name, 0, None
        return
    name = layout.ours(name)
    if layout.stacked and (found := layout.stacked.piece_pattern.match(name)):
        yield layout.stacked.whole.format(**found.groupdict()), PIECES.index(found["piece"]), None
    elif layout.grouped and (found := layout.grouped.whole_pattern.match(name)):
        for piece in PIECES:
            # lora_A maps what goes in, which is the same for all three.
            rows = None if found["end"].startswith("lora_A.") else piece
            yield layout.grouped.piece.format(piece=piece, **found.groupdict()), 0, rows
    else:
        yield name, 0, None


def _prefix(names: Iterable[str]) -> tuple[str, tuple[str, ...]]:
    """What a trainer put before the names of a composite (Lightning: "model."), and its rivals."""
    found: Counter[str] = Counter()
    for name in names:
        steps = name.split(".")
        root = next((i for i, step in enumerate(steps) if step in ROOTS), None)
        if root is not None:
            found[".".join((*steps[:root], ""))] += 1
    if not found:
        return "", ()
    prefix, votes = found.most_common(1)[0]
    rivals = tuple(sorted(each for each in found if found[each] == votes))
    return prefix, rivals if len(rivals) > 1 else ()


def prefix_of(wanted: Iterable[str], available: Iterable[str]) -> str:
    """The prefix under which most of the wanted names are among the available ones."""
    wanted = set(wanted)
    found: Counter[str] = Counter()
    for name in available:
        steps = name.split(".")
        for start in range(len(steps)):
            if ".".join(steps[start:]) in wanted:
                found[".".join((*steps[:start], ""))] += 1
    # The shorter of two that serve alike: max takes the first.
    return max(sorted(found, key=len), key=lambda prefix: found[prefix], default="")
