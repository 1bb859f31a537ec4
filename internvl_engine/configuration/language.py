"""Language models of chat checkpoints as configurations of transformers' own classes, and back.

    published              here           what differs
    LlamaForCausalLM       LlamaConfig
    Qwen2ForCausalLM       Qwen2Config    rope_scaling is ignored, as by the published code
    InternLM2ForCausalLM   LlamaConfig    `bias` is attention_bias; defaults
    Phi3ForCausalLM        Phi3Config     rope_scaling "su" is "longrope", "yarn" one with a scale

Anything else works where transformers has a class for its model_type: no remote code is ever run.
Source: OpenGVLab/InternVL, configuration_internlm2.py and configuration_phi3.py; transformers
4.37.2.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    GenerationConfig,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .rope import check_kind, kind_of, phi3_rope, readable_rope, rope_of, yarn_scale

INTERNLM2 = "InternLM2ForCausalLM"
PUBLISHED = {  # classes of the main code: published model_type and transformers'
    "LlamaForCausalLM": ("llama", "llama"),
    "Qwen2ForCausalLM": ("qwen2", "qwen2"),
    INTERNLM2: ("internlm2", "llama"),
    "Phi3ForCausalLM": ("phi3", "phi3"),
}
_INTERNLM2_DEFAULTS = {
    "vocab_size": 103168, "rms_norm_eps": 1e-6, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "rope_theta": 10000, "bias": True,
}  # fmt: skip
# Fields that a configuration is not made with: where code lies, how it computes, and settings of
# generation, which transformers would act upon. They are kept and written back.
_SETTINGS = frozenset({
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "auto_map",
    "transformers_version", "torch_dtype", "dtype", "model_type", "quantization_config",
    "_commit_hash", "_name_or_path", "output_attentions", "output_hidden_states", "return_dict",
    "use_bfloat16", "torchscript", "is_decoder", "is_encoder_decoder",
    # of generation, where this transformers has no longer the field
    "num_beam_groups", "diversity_penalty", "early_stopping", "do_sample", "num_beams",
})  # fmt: skip
_TOKENS = frozenset({"bos_token_id", "eos_token_id", "pad_token_id", "use_cache"})
USED_ROPE = "rope_scaling_is_used"  # in a Qwen2 dict: unlike the published code, ours goes by it


@dataclass
class Language:
    """A language model's configuration, and what its own file says beyond it.

    Args:
        config: of a class that transformers has.
        architecture: the class that the file names.
        leftovers: fields of the file that config is not made with.
    """

    config: Any
    architecture: str
    leftovers: dict[str, Any] = field(default_factory=dict)


def read_language(given: dict[str, Any] | PretrainedConfig, published: bool) -> Language:
    """The language model of a published `llm_config` or of transformers' `text_config`.

    Raises:
        ValueError: transformers has no causal language model of that kind.
    """
    if isinstance(given, PretrainedConfig):
        return Language(given, _named(given.architectures) or language_class(given).__name__)
    values = copy.deepcopy(given)
    architecture, model_type = _recognise(values)
    if architecture == INTERNLM2:
        values = _INTERNLM2_DEFAULTS | values
        values["attention_bias"] = values.pop("bias")
        values["architectures"] = ["LlamaForCausalLM"]
    unfit = _SETTINGS | (set(GenerationConfig().to_dict()) - _TOKENS)
    leftovers = {name: values.pop(name) for name in [n for n in values if n in unfit]}
    scaling = values.get("rope_scaling")
    if model_type == "qwen2" and published and not values.pop(USED_ROPE, False) and scaling:
        leftovers["rope_scaling"] = values.pop("rope_scaling")
    elif model_type == "phi3" and scaling:
        leftovers["rope_scaling"] = scaling
        values["rope_scaling"] = phi3_rope(scaling)
    check_kind(values)
    config: Any = AutoConfig.for_model(model_type, **readable_rope(values))
    if model_type == "phi3" and kind_of(scaling) == "yarn":
        _rope_parameters(config)["attention_factor"] = yarn_scale(config)
    config.architectures = config.architectures or [language_class(config).__name__]
    return Language(config, architecture or config.architectures[0], leftovers)


def language_class(config: Any) -> Any:
    """transformers' causal language model of a configuration.

    Raises:
        ValueError: there is none.
    """
    try:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise ValueError(
            f"transformers has no causal language model for a {type(config).__name__}"
        ) from None


def written_language(language: Language) -> dict[str, Any]:
    """The `llm_config` of a published checkpoint, as transformers 4.37.2 reads it."""
    values = _plain_dict(language.config)
    leftovers = dict(language.leftovers)
    theta, scaling = rope_of(language.config)
    stored = leftovers.pop("rope_scaling", None)
    if theta is not None:
        values.pop("rope_parameters", None)
        values |= {"rope_theta": theta, "rope_scaling": scaling}
    model_type = values["model_type"]
    if model_type == "phi3" and scaling:
        values["rope_scaling"] = {**phi3_rope(scaling), "type": kind_of(stored) or "su"}
    elif model_type == "llama" and scaling and scaling["rope_type"] in ("linear", "dynamic"):
        # Its classes take these two fields and no other.
        factor = float(scaling["factor"])
        values["rope_scaling"] = {"type": scaling["rope_type"], "factor": factor}
    elif model_type == "qwen2":
        values |= {USED_ROPE: True} if scaling else {"rope_scaling": stored}
    values |= {name: value for name, value in leftovers.items() if name != "model_type"}
    values["architectures"] = [language.architecture]
    if language.architecture == INTERNLM2:
        values["model_type"] = "internlm2"
        values["bias"] = values.pop("attention_bias")
    return values


def transformers_language(language: Language) -> dict[str, Any]:
    """The `text_config` that transformers 4.57 and 5 read, whichever of them writes it.

    Raises:
        ValueError: they have no such rotary scaling (published Phi3's "yarn").
    """
    values = _plain_dict(language.config)
    theta, scaling = rope_of(language.config)
    if values["model_type"] == "phi3" and scaling and "attention_factor" in scaling:
        raise ValueError(
            "transformers' layout has no factor of Phi3's cosine and sine of its own, and this "
            f"model {scaling['attention_factor']:.4g} (published as rope_scaling 'yarn'): save it "
            "with layout='published'"
        )
    if theta is not None:
        values["rope_parameters"] = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
        values |= {"rope_theta": theta, "rope_scaling": scaling}
    if values["model_type"] == "phi3" and scaling:
        values["rope_scaling"] = phi3_rope(scaling)
    return values


def _recognise(values: dict[str, Any]) -> tuple[str | None, str]:
    """The class that a file names, and the model_type that transformers has for it."""
    named, model_type = _named(values.get("architectures")), values.get("model_type")
    for architecture, (published, ours) in PUBLISHED.items():
        if named == architecture or (named is None and published == model_type):
            return architecture, ours
    if model_type is not None and model_type in CONFIG_MAPPING:
        return named, model_type
    for known, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if name == named:
            return named, known
    raise ValueError(
        f"the language model {named or 'without a name'} (model_type {model_type!r}) is unknown: "
        f"needed is {', '.join(PUBLISHED)}, or a causal language model of the installed "
        "transformers; code that comes with a checkpoint is not run"
    )


def _named(architectures: Any) -> str | None:
    return architectures[0] if architectures else None


def _plain_dict(config: Any) -> dict[str, Any]:
    values = config.to_dict()
    for name in ("dtype", "torch_dtype", "transformers_version", "_name_or_path"):
        values.pop(name, None)
    return values


def _rope_parameters(config: Any) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or config.rope_scaling
