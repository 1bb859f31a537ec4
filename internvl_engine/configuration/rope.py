"""Rotary settings: `rope_theta` and `rope_scaling` of files, `rope_parameters` of transformers 5.

Published configurations are read by transformers 4.37, whose classes count the fields of
`rope_scaling` and know no `rope_parameters`.
"""

import copy
import math
from typing import Any

import transformers

_NAMES = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


def kind_of(scaling: Any) -> str | None:
    """The kind that a rope_scaling or rope_parameters names; None is the plain one."""
    if not isinstance(scaling, dict):
        return None
    kind = scaling.get("rope_type") or scaling.get("type")
    return None if kind == "default" else kind


def check_kind(values: dict[str, Any]) -> None:
    """Raises a ValueError where the fields of a configuration name a scaling that is unknown."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # not in 4.37

    for name in ("rope_scaling", "rope_parameters"):
        kind = kind_of(values.get(name))
        if kind is not None and kind not in ROPE_INIT_FUNCTIONS:
            raise ValueError(
                f"{name} is of kind {kind!r}; known are {', '.join(sorted(ROPE_INIT_FUNCTIONS))}"
            )


def rope_of(config: Any) -> tuple[float | None, dict[str, Any] | None]:
    """theta, and the scaling as {"rope_type": kind, ...}, of a configuration; None where plain.

    Settings that differ from layer to layer are none of ours: (None, None).
    """
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    theta = getattr(config, "rope_theta", None)
    if isinstance(scaling, dict):
        if any(isinstance(value, dict) for value in scaling.values()):
            return None, None
        theta = scaling.get("rope_theta", theta)
    kind = kind_of(scaling)
    if kind is None or not isinstance(scaling, dict):
        return theta, None
    rest = {name: value for name, value in scaling.items() if name not in _NAMES}
    return theta, {"rope_type": kind, **copy.deepcopy(rest)}


def readable_rope(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration with its rotary settings as this transformers takes them."""
    given = values.get("rope_parameters")
    if not isinstance(given, dict) or not transformers.__version__.startswith("4."):
        return values
    rest = {n: v for n, v in given.items() if n not in ("rope_theta", "partial_rotary_factor")}
    rest = phi3_rope(rest) if "short_factor" in rest else rest
    kept = {name: value for name, value in values.items() if name != "rope_parameters"}
    kept |= {name: given[name] for name in ("rope_theta", "partial_rotary_factor") if name in given}
    if "rope_scaling" not in kept:
        kept["rope_scaling"] = rest if kind_of(given) else None
    return kept


def phi3_rope(scaling: dict[str, Any]) -> dict[str, Any]:
    """The rope_scaling that transformers' Phi3Config takes, of a published one."""
    kept = {"type": "longrope"}
    return kept | {n: scaling[n] for n in ("short_factor", "long_factor") if n in scaling}


def yarn_scale(config: Any) -> float:
    """What published Phi3 of kind "yarn" multiplies cosine and sine with."""
    stretch = config.max_position_embeddings / config.original_max_position_embeddings
    return 0.1 * math.log(stretch) + 1.0 if stretch > 1 else 1.0
