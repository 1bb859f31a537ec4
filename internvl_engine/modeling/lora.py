"""LoRA on the towers, through peft: which linears are adapted, and how they are wrapped.

Hu et al., LoRA, 2021. Targets and defaults: OpenGVLab/InternVL, modeling_internvl.py.
Cross-attention, LM head and embeddings are not adapted.
"""

from typing import Any

from torch import nn

VISION_LORA = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
QLLAMA_LORA = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]


def wrap_lora(tower: nn.Module, r: int, alpha: int, dropout: float, targets: list[str]) -> Any:
    """Freezes a tower and adapts its target linears with rank r; returns peft's wrapper.

    Raises:
        ImportError: peft is not installed.
        ValueError: the tower has LoRA already. Around a second one, names would be nested in a way
            that no reader of checkpoints knows.
    """
    if any("lora_A" in name.split(".") for name, _ in tower.named_modules()):
        bare: Any = getattr(tower, "get_base_model", lambda: tower)()
        raise ValueError(
            f"{type(bare).__name__} has LoRA already: merge it first (tower.merge_and_unload()), "
            "or take it out (tower.unload())"
        )
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'internvl-engine[train]'") from error
    return get_peft_model(
        tower,
        LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets),
    )
