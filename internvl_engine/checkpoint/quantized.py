"""Checkpoints of quantized weights: ours, and other packages', which are refused by name.

    "quantization_config": {"quant_method": "internvl_engine", "version": 1, "scheme": "int8", ...}

says so in what `internvl convert --quantize` writes. Others are told by the names that each package
writes beside or in place of a weight.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..schemes import Scheme
from .errors import CheckpointError, listed

METHOD = "internvl_engine"
VERSION = 1  # of the layouts of what is stored
FIELD = "quantization_config"

_MARKS = {
    r"\.weight\.(scales|sums)$": "internvl_engine, whose config.json is not beside them",
    r"\.(qweight|qzeros|g_idx)$": "AWQ or GPTQ",
    r"\.weight\.(absmax|quant_map|nested_absmax|quant_state\.\w+)$|\.(SCB|weight_format)$": (
        "bitsandbytes"
    ),
    r"\.weight_(packed|shape|zero_point)$": "compressed-tensors",
    r"\.weight_scale(_inv)?$|\.(input|activation)_scale$": "fp8 or int8",
    r"\.(weight_)?(blocks|scales)$|_(blocks|scales)$": "blocks with scales",
}
_TITLES = {"awq": "AWQ", "gptq": "GPTQ", "bitsandbytes": "bitsandbytes", "fp8": "fp8"}
_SUPPORTED = (
    "Checkpoints that other packages quantized are not supported: take the one it was made from, "
    "with weights in float32, float16 or bfloat16, which quantize='int8' quantizes while it loads"
)


def stated(scheme: Scheme, dtype: str) -> dict[str, Any]:
    """The quantization_config of a checkpoint of ours.

    Args:
        dtype: name of that of the weights before.
    """
    return {"quant_method": METHOD, "version": VERSION, **scheme.to_dict(), "dtype": dtype}


def own_settings(values: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The quantization_config of a config.json where it is one of ours, else None."""
    found = (values or {}).get(FIELD)
    is_ours = isinstance(found, dict) and found.get("quant_method") == METHOD
    return found if is_ours else None


def stored_scheme(settings: Mapping[str, Any], place: Path) -> Scheme:
    """The scheme of a checkpoint.

    Args:
        settings: its quantization_config.
        place: what messages call the file.

    Raises:
        CheckpointError: another version wrote it, or it names no scheme that is known.
    """
    version = settings.get("version")
    if version != VERSION:
        raise CheckpointError(
            f"{place}: its quantized weights are of layout {version!r}, this internvl_engine reads "
            f"layout {VERSION}: quantize the checkpoint that it was made from again (`internvl "
            "convert --quantize`)"
        )
    try:
        return Scheme.from_dict(settings)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{place}: its {FIELD} is not one of ours ({error})") from error


def refuse_quantized(path: Path, names: Iterable[str], values: Mapping[str, Any]) -> None:
    """Raises where weights that are needed are stored in another package's quantized form, or the
    configuration asks for it.

    Args:
        path: of the checkpoint.
        names: published ones of the weights that are needed.
        values: the fields of the configuration that may ask for it.

    Raises:
        CheckpointError: they are.
    """
    names, asked = list(names), stated_quantization(values)
    found: dict[str, list[str]] = {}
    for pattern, title in _MARKS.items():
        marked = [name for name in names if re.search(pattern, name)]
        if marked:
            found.setdefault(title, marked)
    if found:
        kind, marked = next(iter(found.items()))
        raise CheckpointError(
            f"{path}: its weights are quantized with {asked or kind}, by {listed(marked)}. "
            f"{_SUPPORTED}"
        )
    if asked:
        raise CheckpointError(
            f"{path}: its config.json has a quantization_config, {asked}. {_SUPPORTED}. "
            "Where the weights are stored as they were trained, quantization_config=None loads "
            "them so"
        )


def stated_quantization(values: Mapping[str, Any]) -> str | None:
    """What a config.json says about quantization, as a phrase; None where nothing."""
    nested = [value for value in values.values() if isinstance(value, dict)]
    for each in (values, *nested):
        given = each.get("quantization_config")
        if given:
            return describe(given)
    return None


def describe(given: Any) -> str:
    """A quantization_config as a phrase: AWQ, 4 bits."""
    if not isinstance(given, dict):
        given = given.to_dict() if hasattr(given, "to_dict") else {}  # transformers' objects
    values: dict[str, Any] = given
    method = values.get("quant_method")
    if method is None and {"load_in_4bit", "load_in_8bit"} & set(values):
        method = "bitsandbytes"
    method = str(getattr(method, "value", method) or "an unknown method")
    bits = values.get("bits") or values.get("w_bit")
    bits = bits or next((n for n in (4, 8) if values.get(f"load_in_{n}bit")), None)
    return _TITLES.get(method, method) + (f", {bits} bits" if bits else "")
