"""Which weights made an embedding: a short hash of every part of a model.

Embeddings on disk are only comparable with those of the same weights. A few values of every tensor
are hashed, in bfloat16, so that the same checkpoint in another dtype is the same model, and fine-
tuning of any part is not.
"""

import hashlib

import torch
from torch import nn

SAMPLE = 64  # values from the middle of a tensor: a changed tensor changes everywhere
PARTS = {  # part: what the names of its tensors begin with
    "vision": ("vision_model.", "clip_projector."),
    "queries": ("query_tokens", "clip_projector2."),
    "text": ("qllama.", "text_projection"),
}


def fingerprint(model: nn.Module) -> dict[str, str]:
    """The hash of each part of a model that is there, hexadecimal.

    Args:
        model: before `accelerate`, which may keep weights in other forms.

    Returns:
        {"vision": ..., "queries": ..., "text": ...}; parts that were not loaded are left out.
        Cross-attention counts to the queries; the LM head has no part in embeddings.
    """
    samples: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in sorted(model.named_parameters(), key=lambda item: item[0]):
        part = _part(name)
        if part is not None and not tensor.is_meta:
            samples.setdefault(part, []).append((name, tensor))
    return {part: _hash(tensors) for part, tensors in samples.items()}


def _part(name: str) -> str | None:
    if "lm_head" in name:
        return None
    if name.startswith("qllama.") and ".cross_attn." in name:  # poolers have a cross_attn too
        return "queries"
    return next((part for part, prefixes in PARTS.items() if name.startswith(prefixes)), None)


def _hash(tensors: list[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in tensors:
        middle = max(tensor.numel() // 2 - SAMPLE // 2, 0)
        values = tensor.detach().reshape(-1)[middle : middle + SAMPLE]
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(values.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
