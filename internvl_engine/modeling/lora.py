"""LoRA on the towers, through peft: which linears are adapted, and how they are wrapped.

Hu et al., LoRA, 2021. Targets and defaults: OpenGVLab/InternVL, modeling_internvl.py and
modeling_internvl_chat.py. Cross-attention, LM head and embeddings are not adapted.
"""

from typing import Any

from torch import nn

VISION_LORA = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
QLLAMA_LORA = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
# Of any language model: those of these that it has. InternLM2 is a LLaMA here; Phi3 has the packed.
LANGUAGE_LORA = [*QLLAMA_LORA, "self_attn.qkv_proj", "mlp.gate_up_proj"]


class ChatLora:
    """LoRA on the towers of a chat model."""

    config: Any
    vision_model: Any
    language_model: Any

    def wrap_backbone_lora(
        self, r: int = 128, lora_alpha: float | None = None, lora_dropout: float = 0.05
    ) -> None:
        """Freezes the vision tower and puts LoRA of rank r on its attention and MLP linears.

        lora_alpha None is 2 * r. Needs peft.
        """
        alpha = lora_alpha or 2 * r
        self.vision_model = wrap_lora(self.vision_model, r, alpha, lora_dropout, VISION_LORA)
        self.config.use_backbone_lora, self.config.backbone_lora_alpha = r, alpha

    def wrap_llm_lora(
        self, r: int = 128, lora_alpha: float | None = None, lora_dropout: float = 0.05
    ) -> None:
        """Freezes the language model and puts LoRA of rank r on its attention and MLP linears.

        Embeddings and LM head are not adapted. The embeddings' output requires gradients, so that
        recomputed layers (gradient checkpointing) have them. lora_alpha None is 2 * r. Needs peft.

        Raises:
            ValueError: no linear of the language model has a known name.
        """
        refuse_adapted(self.language_model)
        alpha = lora_alpha or 2 * r
        targets = language_targets(self.language_model)
        self.language_model = wrap_lora(
            self.language_model, r, alpha, lora_dropout, targets, "CAUSAL_LM"
        )
        self.language_model.enable_input_require_grads()
        self.config.use_llm_lora, self.config.llm_lora_alpha = r, alpha


def language_targets(language: nn.Module) -> list[str]:
    """The linears of a language model that LoRA adapts, by the ends of their names.

    Raises:
        ValueError: it has none of the names in LANGUAGE_LORA.
    """
    linears = [name for name, m in language.named_modules() if isinstance(m, nn.Linear)]
    found = [t for t in LANGUAGE_LORA if any(name.endswith(f".{t}") for name in linears)]
    if not found:
        raise ValueError(
            f"wrap_llm_lora: {type(language).__name__} has none of the linears "
            f"{', '.join(LANGUAGE_LORA)}; wrap it with peft.get_peft_model and targets of its own"
        )
    return found


def wrap_lora(
    tower: nn.Module,
    r: int,
    alpha: float,
    dropout: float,
    targets: list[str],
    task_type: str | None = None,
) -> Any:
    """Freezes a tower and adapts its target linears with rank r; returns peft's wrapper.

    Args:
        task_type: "CAUSAL_LM" gives the wrapper of a language model, which generates.

    Raises:
        ImportError: peft is not installed.
        ValueError: the rank is none, or the tower has LoRA already. Around a second one, names
            would be nested in a way that no reader of checkpoints knows.
    """
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"LoRA: the rank r must be a whole number from 1 on, got {r!r}")
    refuse_adapted(tower)
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'internvl-engine[train]'") from error
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type=task_type
    )
    wrapped = get_peft_model(tower, config)
    return wrapped if tower.training else wrapped.eval()  # peft's own modules start in training


def refuse_adapted(tower: nn.Module) -> None:
    """Raises ValueError where a tower has LoRA already."""
    if any("lora_A" in name.split(".") for name, _ in tower.named_modules()):
        bare: Any = getattr(tower, "get_base_model", lambda: tower)()
        raise ValueError(
            f"{type(bare).__name__} has LoRA already: merge it first (tower.merge_and_unload()), "
            "or take it out (tower.unload())"
        )
