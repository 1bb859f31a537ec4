"""The loss of chat models.

Source: OpenGVLab/InternVL, modeling_internvl_chat.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def answer_loss(logits: Tensor, labels: Tensor, weight: Any) -> Tensor:
    """Cross-entropy of the next tokens; see `VisionLanguageModel.forward`.

    Args:
        logits: (B, L, V), float32.
        labels: (B, L).
        weight: (B, L), a tensor or lists, or None.
    """
    shifted = logits[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten().to(shifted.device)
    if weight is None:
        return F.cross_entropy(shifted, targets)
    weights = torch.as_tensor(weight, dtype=shifted.dtype, device=shifted.device)
    weights = weights[:, 1:].flatten()
    losses = F.cross_entropy(shifted, targets, reduction="none")
    return (losses * weights).sum() / weights.sum()
