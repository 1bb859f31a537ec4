"""Saves models whose weights are held in forms: wide, one at a time, or as they are held."""

from pathlib import Path
from typing import Any

from .dtypes import dtype_name
from .held import held_parts, held_rules, held_scheme, plain
from .quantized import FIELD, stated
from .quantizing import Quantizing
from .saving import write_weights
from .writing import Planned, add_to_json


def save_forms(
    model: Any, folder: str | Path, *, quantized: bool, max_shard_size: int | str = "5GB"
) -> list[Path]:
    """Writes a model of InternVL-14B, or a tower, whose weights may be held in forms.

    Args:
        model: accelerated or not.
        folder: made where it is not there; a checkpoint in it is replaced.
        quantized: write the forms as they are held, in place of wide weights of their values.
        max_shard_size: bytes or "5GB".

    Returns:
        The files written.

    Raises:
        CheckpointError: no weight is in a form to be written as it is, or there is no room.
    """
    folder = Path(folder)
    state = model.state_dict(keep_vars=True)
    rules = held_rules(model, state, state.keys()) if quantized else {}
    planned = [Planned(name, tuple(t.shape), t.dtype) for name, t in state.items()]
    files = Quantizing(
        planned,
        lambda name: plain(state[name]),
        rules,
        lambda name: held_parts(state[name]),
    )
    written = write_weights(folder, files.planned, files.read, max_shard_size, files.alignment)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if rules:
        values = stated(held_scheme(model, state, rules), dtype_name(model.config.dtype))
        add_to_json(folder / "config.json", {FIELD: values})
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    return [*written, folder / "config.json"]
