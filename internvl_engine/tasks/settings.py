"""Arguments of transformers' `generate` for tasks that return texts: merged, completed, checked."""

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

NOT_FOR_TEXTS = ("num_return_sequences", "return_dict_in_generate", "stopping_criteria", "streamer")


def merged(
    task: str, generation_config: Any = None, **given: Any
) -> tuple[dict[str, Any], GenerationConfig | None]:
    """Arguments that are not None, and those of a configuration that is a dict.

    Args:
        task: named in errors.
        generation_config: of transformers, or a dict, as the published `chat` takes it.
        given: arguments, which come before the configuration.

    Returns:
        The arguments, and the configuration where it is an object.
    """
    if isinstance(generation_config, Mapping):
        given = {**generation_config, **{k: v for k, v in given.items() if v is not None}}
        generation_config = None
    if not isinstance(generation_config, GenerationConfig | None):
        raise TypeError(
            f"{task}: generation_config must be a GenerationConfig or a dict, "
            f"got {generation_config!r:.60}"
        )
    settings = {name: value for name, value in given.items() if value is not None}
    for name in NOT_FOR_TEXTS:
        if settings.get(name, getattr(generation_config, name, None)) not in (None, False, 1):
            raise ValueError(f"{task}: {name} is not for texts; call model.generate for it")
    return settings, generation_config


def completed(
    task: str, settings: dict[str, Any], config: GenerationConfig | None, **usual: int
) -> dict[str, Any]:
    """settings and config of `merged` as arguments of `generate`.

    Args:
        usual: whole numbers of 1 or more, and what they are where neither says it.

    Raises:
        ValueError: one of them is something else.
    """
    for name, value in usual.items():
        settings.setdefault(name, getattr(config, name, None) or value)
        check_whole(task, name, settings[name])
    return settings if config is None else {"generation_config": config, **settings}


def check_whole(task: str, name: str, value: Any, least: int = 1) -> None:
    """Raises ValueError unless value is a whole number of `least` or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{task}: {name} must be a whole number of {least} or more, got {value!r}")
