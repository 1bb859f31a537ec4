"""The language model alone, out of a chat checkpoint or a folder of its own."""

from pathlib import Path
from typing import Any

from ..configuration.language import language_class, read_language
from .errors import CheckpointError, CheckpointNotFoundError
from .families import CHAT, INTERNVL_14B
from .hub import hub_options
from .identify import family_of, language_fields, refuse_adapter
from .locate import Source
from .pretrained import load_pretrained


def load_language_model(source: str | Path, **options: Any) -> Any:
    """Loads a causal language model as transformers' own class, with the guarantees of
    `load_pretrained`.

    Args:
        source: directory, weight file or hub id of a language model, remote-code InternLM2 and
            Phi3 among them, or of a chat checkpoint in any layout. No remote code is run: InternLM2
            becomes a LlamaForCausalLM.
        options: as `load_pretrained` takes them: dtype, device, device_map, merge_lora, ...

    Returns:
        The model in eval mode, with transformers' own rotary embedding: where that is "dynamic", it
        remembers the longest text it has seen, which VisionLanguageModel's does not.

    Raises:
        CheckpointError: it is damaged, or there is no such language model in it.
        ValueError: transformers has no causal language model of that kind.
    """
    found = Source.find(source, **hub_options(options))
    refuse_adapter(found, None)
    values, place = found.config, found.folder / "config.json"
    if values is None:
        raise CheckpointNotFoundError(f"{place}: missing; a language model needs it")
    family = family_of(values)
    if family is INTERNVL_14B or (family is not None and "language" not in family.towers):
        kind = "it has no causal language model that stands alone"
        raise CheckpointError(f"{place}: this is {family.title}: {kind}; {family.advice}")
    language = read_language(language_fields(values), published=family is CHAT)
    if values.get("llm_lora_alpha") and values.get("use_llm_lora"):
        options.setdefault("lora_alpha", values["llm_lora_alpha"])
    return load_pretrained(
        language_class(language.config), source, config=language.config, **options
    )
