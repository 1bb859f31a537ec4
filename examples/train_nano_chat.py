"""Assembles and trains the embedded chat model, internvl_engine/assets/nano_chat.

    python examples/train_nano_chat.py --out nano_chat     needs scikit-learn, for its digits

The vision tower is that of the embedded InternVL (train_nano.py) and stays as it is. A small LLaMA
first learns the conversations with pictures described in words; then `from_parts` joins the two,
and the projector alone learns to say the same by features (the LLaMA frozen); then both learn on.

Everything random follows from --seed, and one thread computes: the same machine writes the same
files. Settings were chosen with --validate, never by the held-out samples.
"""

import argparse
import operator
import platform
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import nano_digits
import numpy as np
import torch
from nano_chat_rows import SIDE, TEMPLATE, Rows, train_tokenizer
from nano_chat_scenes import SYSTEM, WHOLE, Digit, answer_at, choose
from nano_digits import Samples
from PIL import Image
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from internvl_engine import InternVLChat, VisionLanguageModel, VisionLanguageProcessor, freeze
from internvl_engine.assets import held_out_scenes, nano_directory

Scenes = tuple[list[Image.Image], list[list[tuple[str, str]]]]
MAX_TILES = 3
STEPS = {"language": 400, "projector": 300, "both": 1200}
LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 2e-3, 50, 0.05
AVERAGE = 0.995  # of the weights, exponential: what a stage ends with
DTYPE = torch.bfloat16  # on disk, as published checkpoints
# What is scored: name -> a question, and the answer to it about a scene.
QUESTIONS = {
    name: (questions[0], answer)
    for name, (answer, questions) in zip(
        ("digits", "colours", "count", "description"), WHOLE.items(), strict=True
    )
} | {
    "third_digit": ("What is the third?", lambda scene: answer_at(scene, 2, "digit")),
    "second_colour": ("What colour is the second?", lambda scene: answer_at(scene, 1, "colour")),
}
REPORT = """# The embedded chat model

Written by `examples/train_nano_chat.py`, which says how it was assembled and trained. Scores are
those of the files in this directory on {count} pictures of one to three held-out digits
(`internvl_engine.assets.held_out_scenes`): handwriting that neither the vision tower nor the
language model learned from, of people whose other digits they did. It has not learned what several
pictures in one prompt are.

{facts}

| answers right to the letter | float32 | bfloat16 |
|---|---|---|
"""


def main() -> None:
    """Trains the stages, saves, reads back, scores and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--part", type=float, default=1.0, help="share of the steps; default: 1")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--validate", action="store_true", help="score training samples instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    samples, test_samples = nano_digits.load(options.validate)
    start, cpu_start = time.perf_counter(), time.process_time()
    model, processor = train(samples, options.seed, options.part)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    options.out.mkdir(parents=True, exist_ok=True)
    model.to(DTYPE).save_pretrained(options.out)
    processor.save_pretrained(options.out)
    scenes = drawn_plainly(test_samples) if options.validate else held_out_scenes()
    scores = [evaluate(options.out, scenes, dtype) for dtype in (torch.float32, torch.bfloat16)]
    trained = sum(p.numel() for name, p in model.named_parameters() if "vision" not in name)
    facts = (
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {trained:,} of them trained "
        f"here: {', '.join(f'{n} steps of {s}' for s, n in STEPS.items())}, seed {options.seed}: "
        f"{seconds:.0f} s on one thread ({cpu_seconds:.0f} s of processor time), "
        f"{platform.machine()}, torch {torch.__version__}."
    )
    rows = [f"| {name} | {scores[0][name]:.2%} | {scores[1][name]:.2%} |" for name in scores[0]]
    text = REPORT.format(count=len(scenes[0]), facts=facts) + "\n".join([*rows, ""])
    (options.out / "README.md").write_text(text, encoding="utf-8")
    print(text)


def train(
    samples: Samples, seed: int, part: float
) -> tuple[VisionLanguageModel, VisionLanguageProcessor]:
    """The trained model and its processor."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer()
    rows = Rows(samples, tokenizer, seed)
    language = build_language(tokenizer)
    steps = {stage: max(round(part * count), 1) for stage, count in STEPS.items()}
    fit(language, lambda: described_loss(language, rows), steps["language"], "language")
    model = VisionLanguageModel.from_parts(
        vision=nano_directory(), language=language, tokenizer=tokenizer, force_image_size=SIDE,
        template=TEMPLATE.name, system_message=SYSTEM, dynamic_image_size=True, use_thumbnail=True,
        max_dynamic_patch=MAX_TILES, dtype=torch.float32,
    )  # fmt: skip
    print(freeze(model, vision=True, language=True))
    fit(model, lambda: picture_loss(model, rows), steps["projector"], "projector")
    print(freeze(model, vision=True, language=False))
    fit(model, lambda: picture_loss(model, rows), steps["both"], "both")
    return model.eval(), VisionLanguageProcessor.from_config(model.config, tokenizer)


def build_language(tokenizer: Any) -> LlamaForCausalLM:
    """A LLaMA of half a million parameters with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=512,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        )
    )


def described_loss(language: nn.Module, rows: Rows) -> Tensor:
    """Of conversations about pictures that are described in words."""
    batch = rows.described()
    return language(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss


def picture_loss(model: VisionLanguageModel, rows: Rows) -> Tensor:
    """Of conversations about pictures."""
    batch = rows.pictured(model.num_image_token)
    return model(
        pixel_values=batch.tiles, input_ids=batch.ids, attention_mask=batch.mask,
        image_flags=batch.flags, labels=batch.labels,
    ).loss  # fmt: skip


def fit(model: nn.Module, loss_of: Callable[[], Tensor], steps: int, stage: str) -> None:
    """Trains what requires gradients, and leaves the average of its last weights."""
    weights = [p for p in model.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in weights]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in weights if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
        ],
        LEARNING_RATE, betas=(0.9, 0.98),
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=min(WARM_UP / steps, 0.5)
    )
    for step in range(1, steps + 1):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        rate = min(AVERAGE, step / (step + 10))
        for kept, weight in zip(average, weights, strict=True):
            kept.lerp_(weight.detach(), 1 - rate)
        if step % 50 == 0 or step == steps:
            print(f"{stage} {step}/{steps}: loss {loss.item():.4f}", flush=True)
    with torch.no_grad():
        for kept, weight in zip(average, weights, strict=True):
            weight.copy_(kept)


def drawn_plainly(samples: Samples) -> Scenes:
    """Scenes of other samples than the held-out ones, drawn as those are."""
    chosen, scenes = choose(samples, 180, random.Random(1))
    pictures = iter(nano_digits.draw_plainly(Samples(*(field[chosen] for field in samples)), 56))
    images = []
    for scene in scenes:
        parts = [next(pictures).numpy() for _ in scene]
        images.append(Image.fromarray(np.concatenate(parts, axis=1)))
    return images, [[tuple(digit) for digit in scene] for scene in scenes]


def evaluate(directory: Path, scenes: Scenes, dtype: torch.dtype) -> dict[str, float]:
    """Shares of answers that are right to the letter, 0..1, by the name of the question.

    The last one is asked again in the conversation about the first.
    """
    engine = InternVLChat.from_pretrained(directory, dtype=dtype)
    images, shown = scenes
    words = [[Digit(*pair) for pair in pairs] for pairs in shown]
    count, options = len(images), {"batch_size": 60, "max_new_tokens": 24}
    scores, histories = {}, []
    for name, (question, answer) in QUESTIONS.items():
        said = engine.chat(images, [question] * count, return_history=True, **options)
        histories.append([before for _, before in said])
        scores[name] = share([text for text, _ in said], map(answer, words))
    later = engine.chat(question=[question] * count, history=histories[0], **options)
    return scores | {f"{name}_later": share(later, map(answer, words))}


def share(said: list[str], right: Iterable[str]) -> float:
    """The share of equal texts."""
    return sum(map(operator.eq, said, right)) / len(said)


if __name__ == "__main__":
    main()
