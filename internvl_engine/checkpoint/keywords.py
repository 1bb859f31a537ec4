"""Keywords that model cards and scripts pass to `from_pretrained`, as transformers takes them.

What changes nothing here is ignored; what asks for something that would not happen is refused.
"""

from typing import Any

from .hub import HUB_OPTIONS
from .quantized import describe

IGNORED = frozenset({
    # Always so here: built without memory, safetensors first, no code of the checkpoint is run.
    "low_cpu_mem_usage", "trust_remote_code", "use_safetensors", "weights_only", "_fast_init",
    "offload_state_dict", "offload_buffers", "use_fast",
    # `accelerate` chooses the attention, by measurement.
    "attn_implementation", "use_flash_attn", "use_flash_attention_2", "use_kernels",
    # Of the hub, and without effect in its present client.
    "resume_download", "mirror", "code_revision", "use_auth_token",
    # Passed along by the Auto classes and pipelines.
    "_commit_hash", "_from_auto", "_from_pipeline", "adapter_kwargs", "name_or_path",
})  # fmt: skip
_QUANTIZED = (
    "weights are quantized by this package or not at all: quantize='int8' or 'int4' does it while "
    "they are loaded"
)
REFUSED = {
    "load_in_8bit": _QUANTIZED,
    "load_in_4bit": _QUANTIZED,
    "quantization_config": _QUANTIZED,
    "gguf_file": "GGUF files cannot be read; give the checkpoint in safetensors",
    "ignore_mismatched_sizes": "a weight of another shape is always an error, never made up",
    "state_dict": "weights come from the checkpoint; load others with model.load_state_dict",
    "from_tf": "only PyTorch's and safetensors' files can be read",
    "from_flax": "only PyTorch's and safetensors' files can be read",
    "variant": "there are no variants of this family's files; name the weight file itself",
    "key_mapping": "names of weights cannot be mapped; rename them in the file",
    "tp_plan": "tensor parallelism is not supported; device_map spreads a model over devices",
    "device_mesh": "tensor parallelism is not supported; device_map spreads a model over devices",
    "proxies": "set HTTPS_PROXY in the environment",
}


def overrides_of(options: dict[str, Any], fields: set[str]) -> dict[str, Any]:
    """The fields of the configuration among further keywords of `from_pretrained`.

    Args:
        options: those that are no arguments of `load_pretrained`.
        fields: names of the configuration's fields, which win over what is ignored.

    Raises:
        ValueError: one asks for something that is not supported; the message says why.
    """
    found = {}
    for name, value in options.items():
        if name in REFUSED:
            _refuse(name, value)
        elif name in fields or name not in IGNORED | set(HUB_OPTIONS):
            found[name] = value
    return found


def _refuse(name: str, value: Any) -> None:
    if value is None or value is False or value == {}:
        return
    shown = f"{name}={value!r}"
    if name == "quantization_config":
        shown = f"{name} ({describe(value)})"
    elif name == "state_dict":
        shown = name
    raise ValueError(f"from_pretrained: {shown} is not supported: {REFUSED[name]}")
