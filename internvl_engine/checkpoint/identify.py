"""What a checkpoint says it is, and whether a model class can take it; reads no weights."""

from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .families import FAMILIES, INTERNVL_14B, ROOTS, TOWER_ROOTS, Family
from .files import open_weights
from .hub import hub_options
from .locate import Needed, Source
from .names import canonical
from .parts import needs

ADAPTER = "adapter_config.json"


def family_of(values: dict[str, Any]) -> Family | None:
    """The family that a config.json describes; None where it is none of ours."""
    for family in FAMILIES:
        if family.config_fields and all(name in values for name in family.config_fields):
            return family
    fitting = [each for each in FAMILIES if values.get("model_type") in each.model_types]
    return fitting[0] if len(fitting) == 1 else None


def built_by(config_class: Any) -> Family | None:
    """The family whose composite a configuration class is for; None for a tower's class."""
    return next((each for each in FAMILIES if each.builds == config_class.model_type), None)


def tower_of(config_class: Any) -> str:
    """Which tower a configuration class is for: "vision" or "language"."""
    alone = [each for each in FAMILIES if set(each.towers) == {"vision"}]
    is_vision = any(config_class.model_type in each.model_types for each in alone)
    return "vision" if is_vision else "language"


def language_fields(values: dict[str, Any]) -> dict[str, Any]:
    """What of a config.json is about its language model: all where it is nothing else."""
    family = family_of(values)
    tower = family.towers.get("language") if family is not None else None
    own = values if tower is None or tower.config is None else values.get(tower.config)
    return own if isinstance(own, dict) else {}


def own_fields(values: dict[str, Any], config_class: Any) -> dict[str, Any]:
    """What of a config.json is about the model of a class: all, or the part of a tower."""
    family = family_of(values)
    if family is None or built_by(config_class) is not None:
        return values
    name = family.towers[tower_of(config_class)].config
    return values if name is None else values[name]


def needed_by(model_class: Any, parts: str | None) -> Needed | None:
    """Which published names a model class asks for; None where it is everything."""
    family = built_by(model_class.config_class)
    if family is not None:
        return None if parts is None else needs(parts, family)
    others = ROOTS - TOWER_ROOTS[tower_of(model_class.config_class)]
    return lambda name: name.partition(".")[0] not in others


def check_takes(source: str | Path, model_class: Any, **options: Any) -> Source:
    """Finds a checkpoint and raises where it says that it is something else than was asked for.

    Args:
        source: directory, weight file, index, or hub id.
        model_class: what is to be built from it.
        options: of which those about the hub are taken.

    Raises:
        CheckpointNotFoundError: it is not there.
        CheckpointError: it is of another kind; the message says of which, and which class takes it.
    """
    found = Source.find(source, **hub_options(options))
    refuse_adapter(found, built_by(model_class.config_class))
    if found.config is not None:
        check_config(found.config, model_class.config_class, found.folder / "config.json")
    if found.hub is None:
        found.weights()  # which raises where a folder has none
    return found


def check_config(values: dict[str, Any], config_class: Any, place: Path | str) -> None:
    """Raises where a config.json describes another kind of checkpoint than a class needs.

    Args:
        place: what messages call the file.

    Raises:
        CheckpointError: it does, or it leaves out a part of a chat model, which has no defaults.
    """
    family, needed = family_of(values), built_by(config_class)
    if needed is not None:
        fits = family is not None and family.builds == needed.builds
        title = needed.title
    else:
        tower = tower_of(config_class)
        fits = family is None or tower in family.towers
        title = f"a {tower} model, or a checkpoint that has one"
    if fits:
        _check_towers(values, family, place)
        return
    if family is None:
        kind, advice = _stranger(values)
        raise CheckpointError(
            f"{place}: not a {config_class.__name__}: {kind}, not {title}{advice}"
        )
    raise CheckpointError(
        f"{place}: not a {config_class.__name__}: this is {family.title}, not {title}; "
        f"{family.advice}"
    )


def _check_towers(values: dict[str, Any], family: Family | None, place: Path | str) -> None:
    if family is None or family.builds == INTERNVL_14B.builds:  # which has presets
        return
    for name in family.config_fields:
        if not isinstance(values.get(name), dict):
            raise CheckpointError(
                f"{place}: {family.title} needs {' and '.join(family.config_fields)}, each an "
                f"object; {name} is {values.get(name)!r}"
            )


def _stranger(values: dict[str, Any]) -> tuple[str, str]:
    """What a config.json of no family of ours is, and what takes it where something here does."""
    names = values.get("architectures") or ()
    decoder = next((n for n in names if str(n).endswith(("ForCausalLM", "LMHeadModel"))), None)
    if decoder is None:
        return f"it has model_type {values.get('model_type')!r}: another architecture", ""
    advice = (
        "; VisionLanguageModel.from_parts(vision=..., language=...) puts a vision tower and a "
        "projector before it"
    )
    return f"this is a language model alone ({decoder})", advice


def refuse_adapter(source: Source, family: Family | None) -> None:
    """Raises where a folder holds what peft saves: the LoRA matrices alone.

    Args:
        family: whose composite was asked for; None for a tower.

    Raises:
        CheckpointError: it does.
    """
    values = source.json(ADAPTER)
    if values is None or (source.path.is_dir() and (source.folder / "config.json").is_file()):
        return
    kind = f"a peft adapter ({values.get('peft_type', 'LORA')}, rank {values.get('r', 'unknown')})"
    base = values.get("base_model_name_or_path") or "the checkpoint it was trained on"
    place = _adapted(source.folder, family)
    raise CheckpointError(
        f"{source.path}: {kind} without the weights that it adapts. Load {base} with "
        f"from_pretrained, then {place} = peft.PeftModel.from_pretrained({place}, folder)"
    )


def _adapted(folder: Path, family: Family | None) -> str:
    """The module that an adapter belongs on, by the names of its matrices."""
    path = next(folder.glob("adapter_model.*"), None)
    if path is None:
        return "model"
    names = open_weights(path).names()
    name = canonical(next(iter(names), ""))
    if name.partition(".")[0] in ROOTS:
        return "model"
    if family is None:
        return "model"
    vision, language = family.lora
    return f"model.{vision if name.startswith('encoder.') else language}".rstrip(".")
