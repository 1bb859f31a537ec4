"""Which weights of a model are held in fewer bits, and in how many: data, for whoever reads it.

    int8    every large weight
    int4    the layers of a language model (QLLaMA's too) in 4 bits, everything else as int8
    fp8     eight-bit floating point, for GPUs that multiply it; embeddings and heads as int8,
            which keeps four more bits where the largest of many logits decides

Wide stay norms, biases, positions, tables of one or three dimensions, convolutions, and the
attention poolers, which fold two weights into one query and are 0.6 % of the model.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

FORMS = ("int8", "int4", "fp8", "wide")


@dataclass(frozen=True)
class Rule:
    """The form of weights by their names.

    Args:
        pattern: a regular expression that is searched for in the full name of a parameter.
        form: one of FORMS.
        group: columns that share a scale, in int4.
    """

    pattern: str
    form: str
    group: int = 64

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"Rule: form must be one of {', '.join(FORMS)}, got {self.form!r}")
        re.compile(self.pattern)

    @property
    def options(self) -> dict[str, int]:
        """Of the form's `quantize`."""
        return {"group": self.group} if self.form == "int4" else {}


@dataclass(frozen=True)
class Scheme:
    """The form of every weight of a model.

    Args:
        name: what a report and a checkpoint's configuration call it.
        rules: the first whose pattern is found decides; none leaves a weight wide.
        min_size: the smallest side of a weight that is quantized: whole panels have 32 rows.
    """

    name: str
    rules: tuple[Rule, ...]
    min_size: int = 32

    def rule_for(self, name: str, shape: Sequence[int]) -> Rule:
        """What becomes of the weight of a Linear or an embedding.

        Args:
            name: of the parameter, as in the model or in the published checkpoint.
            shape: of its values.
        """
        if len(shape) != 2 or min(shape) < self.min_size or math.prod(shape) == 0:
            return WIDE
        return next((rule for rule in self.rules if re.search(rule.pattern, name)), WIDE)

    def to_dict(self) -> dict[str, Any]:
        """As a configuration holds it; a named scheme is its name."""
        if SCHEMES.get(self.name) == self:
            return {"scheme": self.name}
        rules = [asdict(rule) for rule in self.rules]
        return {"scheme": self.name, "rules": rules, "min_size": self.min_size}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Scheme":
        """What `to_dict` gave; other fields are not read."""
        if "rules" not in values:
            return scheme_of(values.get("scheme"))
        rules = tuple(Rule(**rule) for rule in values["rules"])
        return cls(values["scheme"], rules, values.get("min_size", 32))


WIDE = Rule("", "wide")
# Their products are not those of a Linear, or too small to matter.
_STAY_WIDE = (
    Rule(r"(?<!weight)$", "wide"),  # not the weight of a Linear or an embedding
    Rule(r"position|token_type|norm|clip_projector|lora_|adapter", "wide"),
)
# LLaMA's and its kin's, QLLaMA's cross-attention, Phi-3's merged ones, InternLM2's.
_LANGUAGE_LAYER = (
    r"(self_attn|cross_attn)\.(q|k|v|o|qkv)_proj\.|mlp\.(gate|up|down|gate_up)_proj\."
    r"|attention\.(wqkv|wo)\.|feed_forward\.w[123]\."
)
# Embeddings and heads: LLaMA's and its kin's, InternLM2's, GPT's.
_VOCABULARY = (
    r"embed_tokens|lm_head|tok_embeddings|word_embeddings|wte\.|^output\.|\.output\.weight"
)
SCHEMES = {
    "int8": Scheme("int8", (*_STAY_WIDE, Rule("", "int8"))),
    "int4": Scheme(
        "int4",
        (*_STAY_WIDE, Rule("vision|visual", "int8"), Rule(_LANGUAGE_LAYER, "int4"),
         Rule("", "int8")),
    ),
    "fp8": Scheme("fp8", (*_STAY_WIDE, Rule(_VOCABULARY, "int8"), Rule("", "fp8"))),
}  # fmt: skip


def scheme_of(scheme: "str | Scheme | None") -> Scheme:
    """A scheme by its name, or itself.

    Raises:
        ValueError: there is none of that name.
    """
    if isinstance(scheme, Scheme):
        return scheme
    if scheme not in SCHEMES:
        raise ValueError(
            f"quantize must be one of {', '.join(SCHEMES)} or a Scheme, got {scheme!r}"
        )
    return SCHEMES[scheme]
