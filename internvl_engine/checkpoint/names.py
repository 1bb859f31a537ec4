"""What checkpoints call the same tensor: every layout's names in terms of the published one.

published     vision_model.encoder.layers.0.attn.qkv.weight
LoRA (peft)   vision_model.base_model.model.encoder.layers.0.attn.qkv.base_layer.weight
              vision_model.base_model.model.encoder.layers.0.attn.qkv.lora_A.default.weight
standalone C  blocks.0.attn.qkv.weight      (internvl_c_13b_224px.pth)
one tower     encoder.layers.0.attn.qkv.weight
"""

import re
from collections.abc import Iterable

LORA = re.compile(r"^(?P<linear>.*)\.lora_(?P<side>[AB])\.weight$")
CROSS_ATTENTION = re.compile(r"(?:^|\.)layers\.(\d+)\.cross_attn\.")
POSITIONS = "embeddings.position_embedding"

# Where a part's own names begin in a larger checkpoint: a vision tower, the decoder with and
# without its head, in the composite; the decoder in a checkpoint with a head.
PREFIXES = ("", "vision_model.", "qllama.", "qllama.model.", "model.")

# Weights of the composite that a tower loaded alone never needs; the vision tower's, the decoder's.
_HEADS = ("clip_projector", "itm_head.", "query_tokens", "text_projection", "logit_scale")
BESIDE_VISION = ("qllama.", *_HEADS)
BESIDE_DECODER = ("vision_model.", *_HEADS)

_WRAPPER = "module."  # of DistributedDataParallel and DeepSpeed, where every name has it
_PEFT = (
    (re.compile(r"(^|\.)base_model\.model\."), r"\1"),
    (re.compile(r"\.base_layer\.(weight|bias)$"), r".\1"),
    (re.compile(r"\.(lora_[AB])\.default\.weight$"), r".\1.weight"),
)
_STANDALONE = (
    (re.compile(r"^cls_token$"), "vision_model.embeddings.class_embedding"),
    (re.compile(r"^pos_embed$"), f"vision_model.{POSITIONS}"),
    (re.compile(r"^patch_embed\.proj\."), "vision_model.embeddings.patch_embedding."),
    (re.compile(r"^blocks\.(.*?)(?:\.gamma)?$"), r"vision_model.encoder.layers.\1"),
    (re.compile(r"^transformer\."), "qllama.model."),
)
# Tables that old LLaMA code saved, and what stage-1 training left behind in the standalone file.
# Its LoRA matrices among them: the published inference never applies them.
_LEFTOVERS = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_STANDALONE_LEFTOVERS = re.compile(
    r"^(target_pos_embed|mask_token|grad_norm_square_momentum_(clip|sim))$|^norm3\.|\.lora_[AB]\."
)


def canonical(name: str) -> str:
    """A name without what peft puts into it; of a stored tensor, or of a model's parameter."""
    for pattern, replacement in _PEFT:
        name = pattern.sub(replacement, name)
    return name


def is_standalone(names: Iterable[str]) -> bool:
    """Whether the names are those of the standalone InternVL-C file."""
    unwrapped = {name.removeprefix(_WRAPPER) for name in names}
    return bool(unwrapped & {"cls_token", "pos_embed"}) or any(
        name.startswith("blocks.0.") for name in unwrapped
    )


def translate(names: Iterable[str]) -> tuple[dict[str, str], list[str], list[tuple[str, str]]]:
    """Stored names by published name, known leftovers, and pairs that mean the same tensor."""
    names = list(names)
    wrapped = bool(names) and all(name.startswith(_WRAPPER) for name in names)
    standalone = is_standalone(names)
    stored: dict[str, str] = {}
    leftovers, doubled = [], []
    for name in names:
        plain = name.removeprefix(_WRAPPER) if wrapped else name
        if _LEFTOVERS.search(plain) or (standalone and _STANDALONE_LEFTOVERS.search(plain)):
            leftovers.append(name)
            continue
        published = canonical(plain)
        if standalone:
            for pattern, replacement in _STANDALONE:
                published = pattern.sub(replacement, published)
        if published in stored:
            doubled.append((stored[published], name))
        stored[published] = name
    return stored, leftovers, doubled


def prefix_of(wanted: Iterable[str], available: Iterable[str]) -> str:
    """The prefix under which most of the wanted names are among the available ones."""
    wanted, available = set(wanted), set(available)
    return max(PREFIXES, key=lambda prefix: sum(prefix + name in available for name in wanted))
