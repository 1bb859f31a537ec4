"""The loss of chat models.

Source: OpenGVLab/InternVL, modeling_internvl_chat.py.
"""

import torch.nn.functional as F
from torch import Tensor


def answer_loss(logits: Tensor, labels: Tensor, weight: Tensor | None) -> Tensor:
    """Cross-entropy of the next tokens; see `VisionLanguageModel.forward`.

    Args:
        logits: (B, L, V), float32. labels, weight: (B, L).
    """
    shifted = logits[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten().to(shifted.device)
    if weight is None:
        return F.cross_entropy(shifted, targets)
    weights = weight[:, 1:].flatten().to(shifted.device, shifted.dtype)
    losses = F.cross_entropy(shifted, targets, reduction="none")
    return (losses * weights).sum() / weights.sum()
