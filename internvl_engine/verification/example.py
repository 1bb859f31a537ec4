"""The worked example of the published model card: three images, three texts, nine probabilities."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

TEXTS = ("a photo of a red panda", "一张熊猫的照片", "二匹の猫の写真")
# Softmax over the texts of one image a row, computed in bfloat16 on a GPU.
# Source: OpenGVLab/InternVL-14B-224px, README.
PROBABILITIES = {
    "InternVL-C": (
        (9.9609e-01, 5.2185e-03, 6.0070e-08),
        (2.2949e-02, 9.7656e-01, 5.9903e-06),
        (3.2932e-06, 7.4863e-05, 1.0),
    ),
    "InternVL-G": (
        (9.9609e-01, 3.1738e-03, 3.6322e-08),
        (8.6060e-03, 9.9219e-01, 2.8759e-06),
        (1.7583e-06, 3.1233e-05, 1.0),
    ),
}
# Logits lie between 16 and 64, where bfloat16 is spaced by 1/8 to 1/4. The published ones and ours
# may each be off by one spacing, so their differences, the log of a ratio of probabilities, by 2/4.
TOLERANCE = 0.5
ROUNDING_NEAR_ONE = 1 / 64  # of a probability close to 1 in bfloat16, and of its complement's drift


def check_example(
    model: Any, processor: Any, images: Sequence[str | Path], texts: Sequence[str] = TEXTS
) -> dict[str, dict[str, Any]]:
    """Probabilities of texts given images, in both modes, beside the published ones.

    Args:
        model: InternVLModel with parts "g" or "all".
        processor: its InternVLProcessor.
        images: the three files of the model card's examples, in its order.
        texts: others than the model card's are not compared.

    Returns:
        For each mode: probabilities (rows of images), published (or None) and agrees (or None).
    """
    inputs = processor(images=list(images), text=list(texts), dtype=model.dtype)
    pixels = inputs["pixel_values"].to(model.device)
    ids = inputs["input_ids"].to(model.device)
    compared = tuple(texts) == TEXTS and len(images) == len(TEXTS)
    results: dict[str, dict[str, Any]] = {}
    for mode, published in PROBABILITIES.items():
        with torch.inference_mode():
            logits = model(pixels, ids, mode=mode)[0]
        rows = logits.float().softmax(-1).tolist()
        results[mode] = {
            "probabilities": rows,
            "published": published if compared else None,
            "agrees": agree(rows, published) if compared else None,
        }
    return results


def agree(rows: Sequence[Sequence[float]], published: Sequence[Sequence[float]]) -> bool:
    """Whether every probability is the published one, up to what bfloat16 logits can tell."""
    return all(
        abs(ours - theirs) <= ROUNDING_NEAR_ONE
        if theirs > 0.5
        else ours > 0 and abs(math.log(ours / theirs)) <= TOLERANCE
        for row, expected in zip(rows, published, strict=True)
        for ours, theirs in zip(row, expected, strict=True)
    )
