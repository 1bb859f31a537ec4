"""What train_nano.py says about its pictures, and the vocabulary it says it in."""

import random
from io import BytesIO
from typing import NamedTuple

import torch
from nano_digits import Samples
from torch import Tensor

from internvl_engine.assets import COLOURS, DIGITS
from internvl_engine.processing import InternVLTokenizer

CAPTIONS = (
    "a {colour} {digit}",
    "{colour} {digit}",
    "a photo of a {colour} {digit}",
    "a photo of a {colour} {digit}.",
    "the {colour} digit {digit}",
    "a handwritten {colour} {digit}",
    "the digit {digit} in {colour}",
)
DIGIT_TEXTS = (
    "{digit}",
    "a {digit}",
    "a photo of a {digit}",
    "a photo of a {digit}.",
    "the digit {digit}",
    "a photo of the digit {digit}",
    "the number {digit}",
    "a handwritten {digit}",
    "an image of a {digit}",
)
COLOUR_TEXTS = (
    "{colour}",
    "a {colour} digit",
    "a photo of a {colour} digit",
    "a photo of a {colour}.",
    "a {colour} number",
    "something {colour}",
    "the colour {colour}",
    "{colour} ink",
    "a digit in {colour}",
)
COLOUR_QUESTIONS = (
    "what colour is it?",
    "What colour is it?",
    "what color is it?",
    "which colour is it?",
    "what is the colour of the digit?",
)
DIGIT_QUESTIONS = (
    "what digit is it?",
    "What digit is it?",
    "which digit is it?",
    "what number is it?",
    "which number is this?",
)
PAIRS = [(colour, digit) for colour in COLOURS for digit in DIGITS]


class Dialogue(NamedTuple):
    """Prompts that share an answer, and how often they come up."""

    prompts: list[str]
    answer: str
    weight: int


DIALOGUES = (
    Dialogue(["English caption:"], CAPTIONS[0], 6),
    Dialogue([f"Question: {q} Answer:" for q in DIGIT_QUESTIONS], "{digit}", 4),
    Dialogue([f"Question: {q} Answer:" for q in COLOUR_QUESTIONS], "{colour}", 2),
)


def all_texts(rng: random.Random) -> tuple[list[str], list[str], list[str]]:
    """Every caption, every digit and every colour, each in a wording that `rng` chooses."""
    return (
        [rng.choice(CAPTIONS).format(colour=colour, digit=digit) for colour, digit in PAIRS],
        [rng.choice(DIGIT_TEXTS).format(digit=digit) for digit in DIGITS],
        [rng.choice(COLOUR_TEXTS).format(colour=colour) for colour in COLOURS],
    )


def dialogue_tokens(
    tokenizer: InternVLTokenizer, samples: Samples, rng: random.Random
) -> tuple[Tensor, Tensor, Tensor]:
    """One prompt with its answer for each sample: ids, mask and labels, (B, L) int64.

    Only answers and the `</s>` behind them are scored; all other labels are -100.
    """
    prompts, answers = [], []
    weights = [dialogue.weight for dialogue in DIALOGUES]
    for colour, digit in zip(samples.colour.tolist(), samples.digit.tolist(), strict=True):
        dialogue = rng.choices(DIALOGUES, weights)[0]
        prompts.append(rng.choice(dialogue.prompts))
        answers.append(dialogue.answer.format(colour=COLOURS[colour], digit=DIGITS[digit]))
    heads = tokenizer.encode(prompts)
    tails = tokenizer.encode(answers, bos=False, eos=True)
    length = max(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True))
    ids = torch.full((len(heads), length), tokenizer.training_pad_token_id)
    labels = torch.full_like(ids, -100)
    for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        end = len(head) + len(tail)
        ids[row, :end] = torch.tensor(head + tail)
        labels[row, len(head) : end] = torch.tensor(tail)
    return ids, (ids != tokenizer.training_pad_token_id).long(), labels


def train_tokenizer(vocab_size: int) -> InternVLTokenizer:
    """A BPE vocabulary of the words above, and of every printable character for other words.

    `[PAD]` is its last piece, as in the published vocabulary.
    """
    from sentencepiece import SentencePieceTrainer

    wordings = CAPTIONS + DIGIT_TEXTS + COLOUR_TEXTS
    texts = [wording.format(colour=c, digit=d) for c, d in PAIRS for wording in wordings]
    texts += [prompt for dialogue in DIALOGUES for prompt in dialogue.prompts] * len(PAIRS)
    texts += ["summarize:" + text for text in texts]
    model = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size - 1,
        required_chars="".join(map(chr, range(33, 127))),
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    # The trainer puts control pieces first. A message's repeated fields may go on at its end:
    # `pieces` (field 1) of {1: piece, 2: float32 score, 3: type}, where type 3 is control.
    pad = b"\x0a\x05[PAD]" + b"\x15" + bytes(4) + b"\x18\x03"
    return InternVLTokenizer(model.getvalue() + b"\x0a" + bytes([len(pad)]) + pad)
