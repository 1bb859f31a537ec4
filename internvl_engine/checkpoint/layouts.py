"""How packages name and lay out the same tensors, as data, for reading and for writing.

    our names      vision_model.encoder.layers.0.attn.qkv     language_model...self_attn.q_proj
    transformers   vision_tower.encoder.layer.0.attention.q_proj, k_proj, v_proj
    InternLM2                                                 language_model...attention.wqkv

Ours are the published ones, except that InternLM2 is transformers' LLaMA here.
"""

import re
from dataclasses import dataclass
from functools import cached_property

from .families import POSITIONS

_FIELDS = {"start": r"(?:.*\.)?", "layer": r"\d+", "piece": "[qkv]", "end": ".+"}


@dataclass(frozen=True)
class Fused:
    """q, k and v of a layer, which are one tensor on one side and three on the other.

    Args:
        whole: the name of the one, with {start}, {layer} and {end} for what is the same in both.
        piece: the names of the three, with {piece} for "q", "k" or "v".
    """

    whole: str
    piece: str

    @cached_property
    def whole_pattern(self) -> re.Pattern[str]:
        return _pattern(self.whole)

    @cached_property
    def piece_pattern(self) -> re.Pattern[str]:
        return _pattern(self.piece)


def _pattern(template: str) -> re.Pattern[str]:
    fields = re.sub(r"\\\{(\w+)\\\}", lambda m: f"(?P<{m[1]}>{_FIELDS[m[1]]})", re.escape(template))
    return re.compile(f"^{fields}$")


@dataclass(frozen=True)
class Layout:
    """One way to name the tensors of a family.

    Args:
        name: what messages call it.
        marks: pattern; one stored name that matches tells the layout.
        renames: patterns and their replacements, applied one after the other when reading.
        steps: a step of a stored name, or several, and what we call it; used both ways.
        kept: pattern of the beginnings of names whose steps are left alone.
        stacked: stored as three tensors, which become one of ours, row after row.
        grouped: stored as one tensor, the rows of each key head beside those of its query heads,
            which becomes three of ours.
        leftovers: pattern of stored names that are known and of no use.
        preset: the configuration where the checkpoint has no config.json.
        parts: the parts it holds where no configuration says so.
    """

    name: str
    marks: str
    renames: tuple[tuple[str, str], ...] = ()
    steps: tuple[tuple[str, str], ...] = ()
    kept: str = "$"
    stacked: Fused | None = None
    grouped: Fused | None = None
    leftovers: str | None = None
    preset: str | None = None
    parts: str | None = None

    def ours(self, name: str) -> str:
        """Our name of a stored tensor, as far as it is one tensor on both sides."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return self._replaced(name, self.steps)

    def theirs(self, name: str) -> str:
        """What a tensor of ours is called in this layout, as far as it is one on both sides."""
        return self._replaced(name, [(ours, stored) for stored, ours in self.steps])

    def _replaced(self, name: str, steps: list | tuple) -> str:
        if not re.match(self.kept, name):
            for old, new in steps:
                name = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, name)
        return name


STANDALONE = Layout(
    name="the standalone InternVL-C file",
    marks=r"^(cls_token|pos_embed)$|^blocks\.0\.",
    renames=(
        (r"^cls_token$", "vision_model.embeddings.class_embedding"),
        (r"^pos_embed$", f"vision_model.{POSITIONS}"),
        (r"^patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
        (r"^blocks\.(.*?)(?:\.gamma)?$", r"vision_model.encoder.layers.\1"),
        (r"^transformer\.", "qllama.model."),
    ),
    # What stage-1 training left behind. Its LoRA matrices among them: the published inference
    # never applies them.
    leftovers=(
        r"^(target_pos_embed|mask_token|grad_norm_square_momentum_(clip|sim))$|^norm3\."
        r"|\.lora_[AB]\."
    ),
    preset="14b-224px",
    parts="c",
)
TRANSFORMERS = Layout(
    name="transformers' layout",
    marks=r"(^|\.)embeddings\.cls_token$|(^|\.)encoder\.layer\.\d+\.|^multi_modal_projector\.",
    renames=(
        # Files have the language model's own names; state dicts of the model in memory do not.
        (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
    ),
    steps=(
        ("vision_tower", "vision_model"),
        ("embeddings.cls_token", "embeddings.class_embedding"),
        ("embeddings.position_embeddings", POSITIONS),
        ("embeddings.patch_embeddings.projection", "embeddings.patch_embedding"),
        ("encoder.layer", "encoder.layers"),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("lambda_1", "ls1"),
        ("lambda_2", "ls2"),
        ("attention.projection_layer", "attn.proj"),
        ("attention.q_norm", "attn.q_norm"),
        ("attention.k_norm", "attn.k_norm"),
        ("multi_modal_projector.layer_norm", "mlp1.0"),
        ("multi_modal_projector.linear_1", "mlp1.1"),
        ("multi_modal_projector.linear_2", "mlp1.3"),
    ),
    kept=r"language_model\.",
    stacked=Fused(
        whole="{start}encoder.layers.{layer}.attn.qkv.{end}",
        piece="{start}encoder.layers.{layer}.attention.{piece}_proj.{end}",
    ),
)
# OpenGVLab/InternVL, modeling_internlm2.py
INTERNLM2 = Layout(
    name="InternLM2",
    marks=r"\.attention\.wqkv\.",
    steps=(
        ("tok_embeddings", "embed_tokens"),
        ("attention_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("attention.wo", "self_attn.o_proj"),
        ("feed_forward.w1", "mlp.gate_proj"),
        ("feed_forward.w3", "mlp.up_proj"),
        ("feed_forward.w2", "mlp.down_proj"),
        ("output", "lm_head"),
    ),
    kept=r"vision_model\.|mlp1\.",
    grouped=Fused(
        whole="{start}layers.{layer}.attention.wqkv.{end}",
        piece="{start}layers.{layer}.self_attn.{piece}_proj.{end}",
    ),
)
LAYOUTS = (STANDALONE, TRANSFORMERS, INTERNLM2)
# Of every family: tables that old LLaMA code saved, and the counter of AveragedModel.
LEFTOVERS = r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|^n_averaged$"
