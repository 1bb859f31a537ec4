"""What a scheme of quantized weights loses, on models that know something and at real width.

    nano        the embedded InternVL on its held-out handwriting: zero-shot classification by C and
                G, retrieval, captions and answers
    nano-chat   the embedded chat model on held-out scenes: answers that are right to the letter
    real width  C and G embeddings of images, and states of texts, by one layer of each tower of
                the 14B with random weights, in which a few channels are 1,000 times the others
                (real_width.py)

Wide are the same models in float32.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..acceleration import accelerate
from ..assets import (
    COLOURS,
    DIGITS,
    held_out,
    held_out_scenes,
    in_words,
    nano_chat_directory,
    nano_directory,
)
from ..schemes import SCHEMES, Scheme, scheme_of
from .real_width import embeddings_at_real_width

MODELS = ("nano", "nano-chat", "real width")
BATCH = 60  # scenes at a time
CAPTION = "a {colour} {digit}"
PROMPTS = {
    "caption": ("English caption:", CAPTION),
    "answer": ("Question: what digit is it? Answer:", "{digit}"),
}
QUESTIONS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "digits": ("What digits?", lambda scene: " ".join(digit for _, digit in scene)),
    "colours": ("What colours?", lambda scene: " ".join(colour for colour, _ in scene)),
    "description": ("What is this?", in_words),
}
Answers = dict[str, tuple[list, list]]  # measure: what was said, and what is right


@dataclass(frozen=True)
class Fidelity:
    """One measure of one scheme.

    Args:
        model: one of MODELS.
        measure: what was asked, or which embedding.
        scheme: its name.
        wide: share of right answers with wide weights; 1 for a cosine.
        value: the same share with quantized ones; the smallest cosine to the wide embedding.
        agreement: share of answers that are the wide model's; the cosine of what tells one input
            from the others.
        bytes_part: bytes of all weights as a part of those in bfloat16.
    """

    model: str
    measure: str
    scheme: str
    wide: float
    value: float
    agreement: float
    bytes_part: float


@torch.no_grad()
def fidelity(
    schemes: Sequence[str | Scheme] = tuple(SCHEMES),
    models: Sequence[str] = MODELS,
    *,
    dtype: torch.dtype = torch.float32,
    count: int | None = None,
) -> Iterator[Fidelity]:
    """Measures schemes beside wide weights.

    Args:
        schemes: names, or Schemes; forms are used where they are slower too.
        models: of MODELS.
        dtype: that the quantized models compute in.
        count: held-out pictures, or scenes; None is all of them.

    Raises:
        ValueError: there is no such scheme or model.
    """
    if unknown := set(models) - set(MODELS):
        raise ValueError(f"fidelity: models are {', '.join(MODELS)}, got {', '.join(unknown)}")
    chosen = [scheme_of(scheme) for scheme in schemes]
    for name in models:
        if name == "real width":
            yield from _real_width(chosen, dtype)
        else:
            yield from _answered(name, chosen, dtype, count)


def _answered(
    name: str, schemes: list[Scheme], dtype: torch.dtype, count: int | None
) -> Iterator[Fidelity]:
    answer = {"nano": nano_answers, "nano-chat": chat_answers}[name]
    wide = answer(_load(name, torch.float32), count)
    for scheme in schemes:
        model, part = _quantized(_load(name, dtype), scheme)
        for measure, (said, right) in answer(model, count).items():
            yield Fidelity(
                name, measure, scheme.name, _share(wide[measure][0], right), _share(said, right),
                _share(said, wide[measure][0]), part,
            )  # fmt: skip


def _real_width(schemes: list[Scheme], dtype: torch.dtype) -> Iterator[Fidelity]:
    wide = None
    for scheme in [None, *schemes]:
        part = 1.0

        def prepare(model: Any, scheme: Scheme | None = scheme) -> Any:
            nonlocal part
            if scheme is not None:
                model, part = _quantized(model.to(dtype), scheme)
            return model

        found = embeddings_at_real_width(prepare)
        if scheme is None:
            wide = found
            continue
        assert wide is not None
        for measure, embeds in found.items():
            alone, told_apart = _cosines(embeds.float(), wide[measure])
            yield Fidelity("real width", measure, scheme.name, 1.0, alone, told_apart, part)


def _load(name: str, dtype: torch.dtype) -> Any:
    from ..modeling import InternVL_G
    from ..modeling.chat import VisionLanguageModel

    if name == "nano":
        return InternVL_G.from_pretrained(nano_directory(), dtype=dtype)
    return VisionLanguageModel.from_pretrained(nano_chat_directory(), dtype=dtype)


def _quantized(model: Any, scheme: Scheme) -> tuple[Any, float]:
    """An accelerated model in a scheme, and its bytes as a part of those in bfloat16."""
    accelerate(model, quantize=scheme, only_faster=False)
    parameters = list(model.parameters())
    return model, sum(p.nbytes for p in parameters) / sum(2 * p.numel() for p in parameters)


def nano_answers(model: Any, count: int | None = None) -> Answers:
    """What the embedded InternVL makes of its held-out pictures."""
    from ..processing import InternVLProcessor

    processor = InternVLProcessor.from_pretrained(nano_directory())
    images, pairs = held_out()
    pairs = pairs[:count]
    pixels = processor(images[:count], dtype=model.dtype)["pixel_values"]
    shown = [(colour, digit) for colour in COLOURS for digit in DIGITS]
    words = [CAPTION.format(colour=colour, digit=digit) for colour, digit in shown]
    tokens = processor(text=words)
    texts = F.normalize(model.encode_text(tokens["input_ids"], tokens["attention_mask"]), dim=1)
    digits = texts.unflatten(0, (len(COLOURS), len(DIGITS))).mean(0)
    answers: Answers = {}
    for mode in "CG":
        embeds = model.encode_image(pixels, f"InternVL-{mode}")
        best = (embeds @ F.normalize(digits, dim=1).T).argmax(1)
        answers[f"zero-shot {mode}"] = [DIGITS[i] for i in best], [digit for _, digit in pairs]
        nearest = (embeds @ texts.T).argmax(1)
        answers[f"retrieval {mode}"] = [shown[i] for i in nearest], pairs
    for name, (prompt, answer) in PROMPTS.items():
        said = processor.batch_decode(
            model.generate(pixels, max_new_tokens=8, **processor(prompts=prompt))
        )
        answers[name] = said, [answer.format(colour=c, digit=d) for c, d in pairs]
    return answers


def chat_answers(model: Any, count: int | None = None) -> Answers:
    """What the embedded chat model says to held-out scenes."""
    from ..processing import VisionLanguageProcessor

    processor = VisionLanguageProcessor.from_pretrained(nano_chat_directory())
    words = processor.prompts
    images, scenes = held_out_scenes(180 if count is None else count)
    answers: Answers = {}
    for name, (question, right) in QUESTIONS.items():
        said: list[str] = []
        for start in range(0, len(images), BATCH):
            rows = [_asked(image, question) for image in images[start : start + BATCH]]
            ids = model.generate(
                **processor(messages=rows, dtype=model.dtype), max_new_tokens=24, do_sample=False,
                eos_token_id=words.stop_token_id, pad_token_id=words.pad_token_id,
            )  # fmt: skip
            said += [words.answer(_up_to(row, words.stop_token_id)) for row in ids.tolist()]
        answers[name] = said, [right(scene) for scene in scenes]
    return answers


def _asked(image: Any, question: str) -> list[dict[str, Any]]:
    """A conversation of one question about one picture."""
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def _up_to(ids: list[int], end: int | None) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def _share(said: list, right: list) -> float:
    return sum(a == b for a, b in zip(said, right, strict=True)) / len(right)


def _cosines(found: Tensor, wide: Tensor) -> tuple[float, float]:
    """The smallest cosine of a row of (B, E), and that of all without the mean of the rows."""
    alone = F.cosine_similarity(found, wide, dim=1).min()
    ours, theirs = ((x - x.mean(0)).flatten() for x in (found, wide))
    return float(alone), float(F.cosine_similarity(ours, theirs, dim=0))
