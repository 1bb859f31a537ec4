"""Trains the embedded model, internvl_engine/assets/nano, in minutes on two cores.

    python examples/train_nano.py --out nano              needs scikit-learn, for its digits
    python examples/train_nano.py --out trial --validate    scores a part of the training samples

The whole architecture at tiny widths (preset "nano"), from random weights. One pass over the images
serves three losses: the vision states give the C embedding, and [queries | prompt | answer] through
QLLaMA gives the queries of the G embedding and the captioning loss. Every image is compared with
every caption, digit and colour there is, so that a batch lacks no negative.

Everything random follows from --seed, and one thread computes (at these widths a second one gains
little): the same machine writes the same files. Settings were chosen with --validate, never by the
held-out samples.
"""

import argparse
import platform
import random
import time
from collections.abc import Iterator
from pathlib import Path

import nano_digits
import torch
import torch.nn.functional as F
from nano_digits import Samples
from nano_words import CAPTIONS, DIALOGUES, PAIRS, all_texts, dialogue_tokens, train_tokenizer
from torch import Tensor

from internvl_engine import InternVL_G, InternVLConfig, InternVLProcessor
from internvl_engine.assets import COLOURS, DIGITS, held_out
from internvl_engine.processing import InternVLImageProcessor

STEPS, BATCH = 1800, 64
LEARNING_RATE, WARM_UP, WEIGHT_DECAY = 2e-3, 100, 0.05
AVERAGE = 0.995  # of the weights, exponential: what is saved
DTYPE = torch.bfloat16  # on disk, as the published checkpoint
REPORT = """# The embedded model

Written by `examples/train_nano.py`, which says what is learned from what, and how it is scored.
Scores are those of the files in this directory on the {count} pictures of `held_out.png`:
handwriting that the model did not learn from, of people whose other digits it did. `itm_head` is
not trained.

{facts}

| share right | float32 | bfloat16 |
|---|---|---|
"""


def main() -> None:
    """Trains, saves, reads back, scores and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--validate", action="store_true", help="score training samples instead")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error("--steps must be 1 or more")
    torch.set_num_threads(1)
    train_samples, test_samples = nano_digits.load(options.validate)
    model, processor = build(options.seed)
    start, cpu_start = time.perf_counter(), time.process_time()
    model = train(model, processor, train_samples, options.steps, options.seed)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    options.out.mkdir(parents=True, exist_ok=True)
    model.to(DTYPE).save_pretrained(options.out)
    processor.save_pretrained(options.out)
    nano_digits.save_held_out(test_samples, options.out)
    scores = [evaluate(options.out, dtype) for dtype in (torch.float32, torch.bfloat16)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = (
        f"{parameters:,} parameters, {options.steps} steps of {BATCH} pictures out of "
        f"{len(train_samples.grey):,} samples, seed {options.seed}: {seconds:.0f} s on one thread "
        f"({cpu_seconds:.0f} s of processor time), {platform.machine()}, torch {torch.__version__}."
    )
    text = report(facts, len(test_samples.grey), *scores)
    (options.out / "README.md").write_text(text, encoding="utf-8")
    print(text)


def build(seed: int) -> tuple[InternVL_G, InternVLProcessor]:
    """The model with random weights, and its processor with a vocabulary of its own."""
    torch.manual_seed(seed)
    config = InternVLConfig.from_preset("nano")
    model = InternVL_G(config)
    # Published queries start as zeros in a pretrained decoder; here they would remain alike. And
    # positions must be as loud as patches, or the tower learns colours and no shapes.
    torch.nn.init.normal_(model.query_tokens, std=config.initializer_range)
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding)
    model.vision_model.encoder.gradient_checkpointing = False
    tokenizer = train_tokenizer(config.qllama_config.vocab_size)
    return model, InternVLProcessor(InternVLImageProcessor(config.image_size), tokenizer)


def train(
    model: InternVL_G, processor: InternVLProcessor, samples: Samples, steps: int, seed: int
) -> InternVL_G:
    """AdamW with warm-up and cosine; returns the moving average of the model's weights."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
    from tqdm import tqdm

    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        LEARNING_RATE,
        total_steps=steps + 1,  # one for the step before the first
        pct_start=min(WARM_UP / steps, 0.3),
        cycle_momentum=False,
    )
    rng = random.Random(seed)
    model.train()
    drawn = batches(samples, processor.image_processor, steps, seed)
    for pixels, batch in tqdm(drawn, "training", steps, unit="step", disable=None):
        loss = total_loss(model, processor, pixels, batch, rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
    return average.module.eval()


def batches(
    samples: Samples, images: InternVLImageProcessor, steps: int, seed: int
) -> Iterator[tuple[Tensor, Samples]]:
    """Normalised pictures (B, 3, S, S), varied anew and in random ink each time."""
    generator = torch.Generator().manual_seed(seed)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (images.mean, images.std))
    for _ in range(steps):
        chosen = torch.randint(len(samples.grey), (BATCH,), generator=generator)
        colour = torch.randint(len(COLOURS), (BATCH,), generator=generator)
        batch = Samples(samples.grey[chosen], samples.digit[chosen], colour)
        yield (nano_digits.draw_varied(batch, images.size, generator) - mean) / std, batch


def total_loss(
    model: InternVL_G,
    processor: InternVLProcessor,
    pixels: Tensor,
    samples: Samples,
    rng: random.Random,
) -> Tensor:
    """Contrastive C + contrastive G + captioning, in one pass over pixels (B, 3, S, S)."""
    states = model.vision_model(pixel_values=pixels).last_hidden_state
    ids, mask, labels = dialogue_tokens(processor.tokenizer, samples, rng)
    queries = model.query_tokens.expand(len(states), -1, -1)
    unscored = labels.new_full(queries.shape[:2], -100)
    output = model.qllama(
        inputs_embeds=torch.cat((queries, model.qllama.get_input_embeddings()(ids)), dim=1),
        attention_mask=torch.cat((torch.ones_like(unscored), mask), dim=1),
        vision_hidden_states=states,
        use_zero_attention_mask=True,
        labels=torch.cat((unscored, labels), dim=1),
        output_hidden_states=True,
        use_cache=False,
    )
    # The queries see no text: these are the states that `get_image_features` has.
    read = output.hidden_states[-1][:, : queries.shape[1]]
    embed_c = F.normalize(model.clip_projector(states), dim=1)
    embed_g = F.normalize(embed_c + F.normalize(model.clip_projector2(read), dim=1), dim=1)
    return contrast(model, processor, (embed_c, embed_g), samples, rng) + output.loss


def contrast(
    model: InternVL_G,
    processor: InternVLProcessor,
    images: tuple[Tensor, ...],
    samples: Samples,
    rng: random.Random,
) -> Tensor:
    """Mean contrastive loss of each kind of unit image embedding with each kind of text.

    Their sum would drown the captioning loss at first, which alone tells digits apart before either
    side of the contrast does: texts that no image can be told by fall together, and stay so.
    """
    groups = all_texts(rng)
    tokens = processor(text=[text for group in groups for text in group])
    texts = F.normalize(model.encode_text(tokens["input_ids"], tokens["attention_mask"]), dim=1)
    truths = (samples.colour * len(DIGITS) + samples.digit, samples.digit, samples.colour)
    loss = texts.new_zeros(())
    for embeds, truth in zip(texts.split([len(group) for group in groups]), truths, strict=True):
        for image in images:
            loss = loss + soft_contrastive_loss(
                model.logit_scale.exp() * image @ embeds.T, F.one_hot(truth, len(embeds)).bool()
            )
    return loss / (len(groups) * len(images))


def soft_contrastive_loss(logits: Tensor, match: Tensor) -> Tensor:
    """Both softmaxes of (B, T) logits; all that match (B, T) share a target, and texts without an
    image in the batch are negatives only."""
    loss = F.cross_entropy(logits, match / match.sum(1, keepdim=True))
    shown = match.any(0)
    logits, match = logits[:, shown].T, match[:, shown].T
    return (loss + F.cross_entropy(logits, match / match.sum(1, keepdim=True))) / 2


@torch.inference_mode()
def evaluate(directory: Path, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Shares of right answers, 0..1, on the held-out pictures beside a checkpoint.

    Zero-shot: the ten digits, each the average of "a {colour} {digit}" over the colours. R@1:
    whether the best of the 50 captions, or the best of the pictures, is a right one. Captions and
    answers (greedy) count where they are right to the letter.
    """
    model = InternVL_G.from_pretrained(directory, dtype=dtype).eval()
    processor = InternVLProcessor.from_pretrained(directory)
    images, pairs = held_out(directory)
    pixels = processor(images, dtype=dtype)["pixel_values"]
    tokens = processor(text=[CAPTIONS[0].format(colour=c, digit=d) for c, d in PAIRS])
    texts = F.normalize(model.encode_text(tokens["input_ids"], tokens["attention_mask"]), dim=1)
    digits = F.normalize(texts.unflatten(0, (len(COLOURS), len(DIGITS))).mean(0), dim=1)
    truth = torch.tensor([PAIRS.index(pair) for pair in pairs])
    shown = truth.unique()
    scores = {}
    for mode in "cg":
        embeds = F.normalize(model.encode_image(pixels, f"InternVL-{mode.upper()}"), dim=1)
        scores[f"zero_shot_{mode}"] = share((embeds @ digits.T).argmax(1) == truth % len(DIGITS))
        similarity = embeds @ texts.T
        scores[f"image_to_text_r1_{mode}"] = share(similarity.argmax(1) == truth)
        scores[f"text_to_image_r1_{mode}"] = share(truth[similarity.argmax(0)[shown]] == shown)
    for name, dialogue in zip(("caption", "answer_digit", "answer_colour"), DIALOGUES, strict=True):
        prompt = processor(prompts=dialogue.prompts[0])
        said = processor.batch_decode(model.generate(pixels, max_new_tokens=8, **prompt))
        right = [dialogue.answer.format(colour=colour, digit=digit) for colour, digit in pairs]
        scores[name] = share(torch.tensor([a == b for a, b in zip(said, right, strict=True)]))
    return scores


def share(right: Tensor) -> float:
    """The share of True."""
    return right.double().mean().item()


def report(facts: str, count: int, wide: dict[str, float], narrow: dict[str, float]) -> str:
    """README.md of a checkpoint: `facts`, and its scores on `count` pictures in two dtypes."""
    rows = [f"| {key} | {wide[key]:.2%} | {narrow[key]:.2%} |" for key in wide]
    return "\n".join([*REPORT.format(count=count, facts=facts).splitlines(), *rows, ""])


if __name__ == "__main__":
    main()
