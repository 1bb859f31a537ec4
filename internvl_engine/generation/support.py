"""Which models and calls the static engine serves; the others go to transformers' own loops.

A step is static where nothing in it depends on a length that the host knows: rotary angles are a
function of the position alone, a cache forgets nothing, and attention takes a mask.
"""

from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMode

from ..configuration.rope import rope_of
from ..modeling.qllama import LlamaForCausalLM
from ..weights.linears import is_hooked

# By name: their files take time to import.
MODELS = frozenset({
    "LlamaForCausalLM", "MistralForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
})  # fmt: skip
MODES = frozenset({
    GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
})  # fmt: skip
ROTARY = frozenset({"linear", "llama3", "yarn"})  # whose angles depend on the position alone
ATTENTION = frozenset({"eager", "sdpa", None})
# Options of `generate` that choose another way to decode, or that a callable of `generate` loses.
ELSEWHERE = (
    "assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "penalty_alpha",
    "dola_layers", "num_beam_groups", "constraints", "force_words_ids", "stop_strings",
    "cache_implementation", "custom_generate", "synced_gpus", "prefill_chunk_size", "low_memory",
    "return_dict_in_generate", "token_healing", "tokenizer", "use_model_defaults",
    "trust_remote_code",
)  # fmt: skip
CACHE_LAYERS = frozenset({"DynamicLayer", "DynamicSlidingWindowLayer", "KVCacheLayer"})


def goes_elsewhere(model: Any, options: dict[str, Any]) -> bool:
    """Whether a call of a model's `generate` asks for what transformers alone decodes."""
    config = options.get("generation_config")
    if _is_sharded(model):
        return True
    asked = (options.get(name, getattr(config, name, None)) for name in ELSEWHERE)
    return any(value is True or value not in (None, False, 0, 1, []) for value in asked)


def _is_sharded(model: Any) -> bool:
    """Whether processes hold parts of the model, and must take every step together."""
    group = torch.distributed
    if not (group.is_available() and group.is_initialized() and group.get_world_size() > 1):
        return False
    return any(
        hasattr(parameter, "ds_id") or type(parameter).__name__ in ("DTensor", "FlatParameter")
        for parameter in model.parameters()
    )


def unsupported_model(model: Any, length: int) -> str | None:
    """Why steps of a language model up to so many tokens cannot be static, or None."""
    config = model.config
    ours = isinstance(model, LlamaForCausalLM)
    theirs = type(model).__name__ in MODELS and type(model).__module__.startswith("transformers.")
    if not ours and not theirs:
        return f"{type(model).__name__} is not known"
    if model.training:
        return "it trains"
    if any(map(_is_compiled, model.modules())):
        return "it is compiled, for caches of other classes"
    if "prepare_inputs_for_generation" in vars(model):
        return "somebody else prepares its inputs"  # soft prompts
    if ours:
        return None
    kind = rope_of(config)[1]
    if kind is not None and kind["rope_type"] not in ROTARY:
        return f"its rotary scaling is {kind['rope_type']}"
    if rope_of(config)[0] is None:
        return "its rotary settings differ from layer to layer"
    if getattr(config, "_attn_implementation", None) not in ATTENTION:
        return f"its attention is {config._attn_implementation}"
    window = getattr(config, "sliding_window", None)
    if window is not None and length >= window:
        return f"it forgets what is {window} tokens back"
    return None


def unsupported_call(config: GenerationConfig) -> str | None:
    """Why a call of `generate` with this resolved configuration is not served, or None."""
    if config.get_generation_mode() not in MODES:
        return f"it decodes by {config.get_generation_mode()}"
    for name in ("return_dict_in_generate", "is_assistant", "output_attentions",
                 "output_hidden_states", "prefill_chunk_size", "low_memory"):  # fmt: skip
        if getattr(config, name, None):
            return f"{name} is set"
    return None if config.use_cache else "it uses no cache"


def unsupported_cache(cache: Any, length: int) -> str | None:
    """Why what a cache holds after so many tokens cannot be taken over, or None."""
    layers = getattr(cache, "layers", None)
    if not layers or any(type(layer).__name__ not in CACHE_LAYERS for layer in layers):
        return f"its cache is a {type(cache).__name__}"
    if length == 0:
        return None
    first = layers[0].keys
    # Under autocast rotated keys may be wider than values; attention casts both.
    mixed = torch.is_autocast_enabled(first.device.type)
    for layer in layers:
        for states in (layer.keys, layer.values):
            alike = states is not None and (states.shape, states.device) == (
                first.shape, first.device,
            )  # fmt: skip
            if not alike or not (mixed or states.dtype == first.dtype):
                return "its layers differ"
    return None if first.shape[2] == length else "it does not hold every token"


def is_capturable(model: Any) -> bool:
    """Whether a step may run without calling the modules: nobody watches or moves them.

    Weights that are brought when a module is called (offloaded ones) come with hooks.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        return False
    for module in model.modules():
        if is_hooked(module):
            return False
    return True


def has_counted_positions(model: Any, positions: Any, mask: Any) -> bool:
    """Whether the next token of every row has the position that the count of its tokens says.

    Args:
        positions: (B, T), as `generate` was given or made them; None where the model counts.
        mask: (B, T), 0 where a position is padding; None where none is.
    """
    if positions is None or isinstance(model, LlamaForCausalLM):  # which counts for itself
        return True
    if positions.dim() != 2:
        return False
    counted = positions.shape[1] if mask is None else (mask != 0).sum(1)
    return bool((positions[:, -1] + 1 == counted).all())


def _is_compiled(module: Any) -> bool:
    fusion = vars(module).get("_fusion")
    compiled = module._compiled_call_impl is not None or "_orig_mod" in module._modules
    return compiled or getattr(fusion, "compiled", None) is not None
