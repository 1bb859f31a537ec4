"""Language models of chat checkpoints as configurations of transformers' own classes, and back.

    published            here              what differs
    LlamaForCausalLM     LlamaConfig
    Qwen2ForCausalLM     Qwen2Config       rope_scaling is ignored, as the published code does
    InternLM2ForCausalLM LlamaConfig       `bias` is attention_bias
    Phi3ForCausalLM      Phi3Config        "su" is "longrope"; "yarn" is too, with its own scale

Anything else works where transformers has a class for its model_type. No remote code is run.
Source: OpenGVLab/InternVL, configuration_internlm2.py and configuration_phi3.py; transformers
4.37.2.
"""

import copy
import math
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    GenerationConfig,
    PretrainedConfig,
)

INTERNLM2 = "InternLM2ForCausalLM"
PHI3 = "Phi3ForCausalLM"
QWEN2 = "Qwen2ForCausalLM"
# What old transformers wrote into every configuration, and what would change how ours is built.
_SETTINGS = frozenset({
    "attn_implementation", "_attn_implementation", "auto_map", "transformers_version",
    "torch_dtype", "dtype", "model_type", "quantization_config", "_commit_hash",
})  # fmt: skip
_ENDS = frozenset({"bos_token_id", "eos_token_id", "pad_token_id", "use_cache"})


@dataclass
class Language:
    """A language model's configuration, and what its own file says beyond it.

    Args:
        config: of a class that transformers has.
        architecture: the class that the published file names.
        leftovers: fields of the published file that config has no use for; written back.
    """

    config: Any
    architecture: str
    leftovers: dict[str, Any] = field(default_factory=dict)


def read_language(given: dict[str, Any] | PretrainedConfig, published: bool) -> Language:
    """The language model of `llm_config` or, from transformers' layout, of `text_config`.

    Raises:
        ValueError: transformers has no causal language model of that kind.
    """
    if isinstance(given, PretrainedConfig):
        return Language(given, architecture_of(given))
    values = dict(given)
    named = (values.get("architectures") or [None])[0]
    model_type = values.get("model_type")
    if named == INTERNLM2 or model_type == "internlm2":
        named, model_type = INTERNLM2, "llama"
        values["attention_bias"] = values.pop("bias", True)
        values.setdefault("rope_theta", 10000)
        values.setdefault("vocab_size", 103168)
        values["architectures"] = ["LlamaForCausalLM"]
    if model_type not in CONFIG_MAPPING:
        model_type = _model_type_of(named, model_type)
    leftovers = {name: values.pop(name) for name in _foreign(values)}
    if published and (named == QWEN2 or model_type == "qwen2") and "rope_scaling" in values:
        leftovers["rope_scaling"] = values.pop("rope_scaling")
    values = copy.deepcopy(values)
    scaling = values.get("rope_scaling")
    if model_type == "phi3" and scaling:
        scaling["type"] = scaling.pop("rope_type", "longrope")
        leftovers["rope_scaling"] = dict(scaling)
        scaling["type"] = "longrope"
    config: Any = AutoConfig.for_model(model_type, **values)
    return Language(config, named or architecture_of(config), leftovers)


def architecture_of(config: Any) -> str:
    """The class that a configuration names, or else the one that transformers has for it."""
    if config.architectures:
        return config.architectures[0]
    return language_class(config).__name__


def language_class(config: Any) -> Any:
    """transformers' causal language model of a configuration.

    Raises:
        ValueError: there is none.
    """
    try:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError as error:
        raise ValueError(
            f"VisionLanguageModel: transformers has no causal language model for a "
            f"{type(config).__name__}"
        ) from error


def _model_type_of(named: str | None, model_type: str | None) -> str:
    names = getattr(MODEL_FOR_CAUSAL_LM_MAPPING, "_model_mapping", {})
    for known, class_name in names.items():
        if class_name == named:
            return known
    raise ValueError(
        f"VisionLanguageConfig: the language model {named or model_type!r} (model_type "
        f"{model_type!r}) is unknown. Known are {INTERNLM2} and every causal language model of "
        "the installed transformers; remote code is never run"
    )


def _foreign(values: dict[str, Any]) -> list[str]:
    """Fields that a configuration may not be given: settings of other software, and generation's.

    transformers makes a GenerationConfig of what a configuration holds.
    """
    generation = set(GenerationConfig().to_dict()) - _ENDS
    legacy = {"do_sample", "early_stopping", "num_beams", "num_beam_groups", "top_k", "top_p",
              "temperature", "max_length", "min_length", "repetition_penalty", "length_penalty",
              "no_repeat_ngram_size", "diversity_penalty", "typical_p", "return_dict_in_generate",
              "output_scores", "num_return_sequences", "bad_words_ids"}  # fmt: skip
    return [name for name in values if name in _SETTINGS | generation | legacy]


def written_language(language: Language) -> dict[str, Any]:
    """The `llm_config` that a published checkpoint has."""
    values = language.config.to_dict()
    values |= {n: v for n, v in language.leftovers.items() if n not in values}
    values["architectures"] = [language.architecture]
    if language.architecture == INTERNLM2:
        values["model_type"] = "internlm2"
        values["bias"] = values.pop("attention_bias")
    return values


def _yarn_scale(s: float) -> float:
    return 0.1 * math.log(s) + 1 if s > 1 else 1.0
