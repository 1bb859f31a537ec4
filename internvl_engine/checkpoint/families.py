"""What is known of every family of checkpoints, as data: names, parts, and what weights decide.

    InternVL-14B     vision_model.*  qllama.*  clip_projector.* ...    published, standalone C
    InternVL chat    vision_model.*  mlp1.*  language_model.*          published
                     vision_tower.*  multi_modal_projector.* ...       transformers
    InternViT        embeddings.*  encoder.*                           published, transformers

A stored name becomes a published one in three steps: wrappers of trainers go (names.py), the rules
of the layout that the names are in apply (layouts.py), and several tensors may become one, row
after row, or one become several.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

POSITIONS = "embeddings.position_embedding"
CROSS_ATTENTION = r"(?:^|\.)layers\.(\d+)\.cross_attn\."


@dataclass(frozen=True)
class Tower:
    """A part of a checkpoint that has a model class of its own.

    Args:
        config: the field of config.json with its configuration; None where that is the whole file.
        is_transformers: whether the fields are those of transformers' InternVLVisionConfig.
    """

    config: str | None = None
    is_transformers: bool = False


@dataclass(frozen=True)
class Family:
    """Checkpoints that share one meaning of their published names.

    Args:
        title: what messages call one of them, with its article.
        model_types: of config.json. Two families may share one: `config_fields` then decides.
        config_fields: fields that its config.json has.
        builds: model_type of our composite configuration; None where we have no composite.
        towers: "vision" and "language" to what can be loaded alone.
        advice: what to do with one where another was needed.
        parts: name of a part to patterns of the published names that it needs; smallest first.
        lora: beginning of published names to the name of the tower in the configuration's fields
            `use_NAME_lora` and `NAME_lora_alpha`.
        forces_size: whether `force_image_size` is the size that the position table is for.
    """

    title: str
    model_types: tuple[str, ...]
    config_fields: tuple[str, ...] = ()
    builds: str | None = None
    towers: Mapping[str, Tower] = field(default_factory=dict)
    advice: str = ""
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lora: Mapping[str, str] = field(default_factory=dict)
    forces_size: bool = False


# image     vision tower and its pooler: the C embedding of images
# text      QLLaMA as a plain LLaMA, without head and cross-attention: embeddings of texts
# c         image, text and the logit scale: everything of InternVL-C
# g         c, query tokens, cross-attention and the second pooler: everything of InternVL-G
# caption   vision tower, query tokens and all of QLLaMA: captions and answers
# all       the whole model
_VISION = r"vision_model\."
_POOLER = r"clip_projector\."
_TEXT = r"qllama\.model\.(?!layers\.\d+\.cross_attn\.)"
_PROJECTION = r"text_projection$"
_C = (_VISION, _POOLER, _TEXT, _PROJECTION, r"logit_scale$")

INTERNVL_14B = Family(
    title="an InternVL-14B checkpoint",
    model_types=("internvl", "internvl_14b"),
    config_fields=("vision_config", "qllama_config"),
    builds="internvl_14b",
    towers={
        "vision": Tower("vision_config"),
        "language": Tower("qllama_config"),
    },
    advice="InternVLModel, InternVL_C, InternVL_G and InternVL take it",
    parts={
        "image": (_VISION, _POOLER),
        "text": (_TEXT, _PROJECTION),
        "c": _C,
        "g": (*_C, r"qllama\.model\.", r"query_tokens$", r"clip_projector2\."),
        "caption": (_VISION, r"qllama\.", r"query_tokens$"),
        "all": ("",),
    },
    lora={"vision_model.": "backbone", "qllama.": "qllama"},
    forces_size=True,
)
# vision    vision tower and projector: the features of images in the language model's width
# language  the language model alone: text
# all       the whole model
_CHAT_PARTS = {
    "vision": (_VISION, r"mlp1\."),
    "language": (r"language_model\.",),
    "all": ("",),
}
_CHAT_LORA = {"vision_model.": "backbone", "language_model.": "llm"}
_CHAT_ADVICE = (
    "VisionLanguageModel and InternVLChat take it; InternVisionModel takes its vision tower"
)
CHAT = Family(
    title="a chat checkpoint (vision tower, MLP and a language model)",
    model_types=("internvl_chat",),
    config_fields=("vision_config", "llm_config"),
    builds="internvl_chat",
    towers={
        "vision": Tower("vision_config"),
        "language": Tower("llm_config"),
    },
    advice=_CHAT_ADVICE,
    parts=_CHAT_PARTS,
    lora=_CHAT_LORA,
)
TRANSFORMERS_CHAT = Family(
    title="a chat checkpoint in transformers' layout (InternVLForConditionalGeneration)",
    model_types=("internvl",),
    config_fields=("vision_config", "text_config"),
    builds="internvl_chat",
    towers={
        "vision": Tower("vision_config", is_transformers=True),
        "language": Tower("text_config"),
    },
    advice=_CHAT_ADVICE,
    parts=_CHAT_PARTS,
    lora=_CHAT_LORA,
)
_VISION_ADVICE = (
    "InternVisionModel takes it, and VisionLanguageModel.from_parts(vision=..., language=...) puts "
    "a projector and a language model behind it"
)
VISION = Family(
    title="an InternViT vision tower alone",
    model_types=("intern_vit_6b", "intern_vit_300m"),
    towers={"vision": Tower()},
    advice=_VISION_ADVICE,
)
TRANSFORMERS_VISION = Family(
    title="an InternViT vision tower alone, in transformers' layout",
    model_types=("internvl_vision",),
    towers={"vision": Tower(is_transformers=True)},
    advice=_VISION_ADVICE,
)
QUERY_BRIDGE = Family(
    title="a query bridge (learned queries and QLLaMA alone)",
    model_types=("internvl_query_bridge",),
    builds="internvl_query_bridge",
    advice="QueryBridge takes it",
    parts={"all": ("",)},
)
FAMILIES = (INTERNVL_14B, CHAT, TRANSFORMERS_CHAT, VISION, TRANSFORMERS_VISION, QUERY_BRIDGE)

# Names at the top of a composite. Whatever stands before one of them is a trainer's prefix.
ROOTS = frozenset({
    "vision_model", "qllama", "query_tokens", "text_projection", "logit_scale", "clip_projector",
    "clip_projector2", "itm_head", "language_model", "mlp1", "vision_tower",
    "multi_modal_projector",
})  # fmt: skip
# Those of them that belong to a tower, by what `Family.towers` calls it.
TOWER_ROOTS = {"vision": {"vision_model"}, "language": {"qllama", "language_model"}}

# Linears of one input, whose products are one where their weights lie one below the other.
NEIGHBOURS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
