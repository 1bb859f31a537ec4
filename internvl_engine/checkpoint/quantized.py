"""Checkpoints that other packages quantized: recognised, and refused with what they are.

The names are those that each package writes beside or in place of a weight. What `internvl convert
--quantize` writes is read, see forms.py.
"""

import re
from typing import Any

from .contents import Contents
from .errors import CheckpointError, listed
from .schemes import own_settings

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


def refuse_quantized(contents: Contents, values: dict[str, Any]) -> None:
    """Raises where weights that are needed are stored in another package's quantized form, or the
    configuration asks for it.

    Args:
        values: the fields of the configuration that may ask for it.

    Raises:
        CheckpointError: they are.
    """
    if own_settings(values) is not None:
        return
    stated = stated_quantization(values)
    found: dict[str, list[str]] = {}
    for pattern, title in _MARKS.items():
        marked = [name for name in contents.tensors if re.search(pattern, name)]
        if marked:
            found.setdefault(title, marked)
    if found:
        kind, names = next(iter(found.items()))
        raise CheckpointError(
            f"{contents.path}: its weights are quantized with {stated or kind}, by "
            f"{listed(names)}. {_SUPPORTED}"
        )
    if stated:
        raise CheckpointError(
            f"{contents.path}: its config.json has a quantization_config, {stated}. {_SUPPORTED}. "
            "Where the weights are stored as they were trained, quantization_config=None loads "
            "them so"
        )


def stated_quantization(values: dict[str, Any]) -> str | None:
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
