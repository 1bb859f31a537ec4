"""Pictures with one, two or three digits, and what can be asked about them.

The digits are those of nano_digits.py, side by side, one tile each. A conversation asks one to
three questions in a row; only the answers are learned.
"""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from nano_digits import Samples, draw_varied
from torch import Tensor

from internvl_engine.assets import COLOURS, DIGITS, in_words

COUNTS = ("one", "two", "three")
PLACES = ("first", "second", "third")
SYSTEM = "You read handwritten digits."
GREETING = "hello, show me a picture of digits"


class Digit(NamedTuple):
    """One digit of a picture, in words."""

    colour: str
    digit: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.digit}"


Scene = Sequence[Digit]


class Turn(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


WHOLE: dict[Callable[[Scene], str], tuple[str, ...]] = {
    lambda scene: " ".join(each.digit for each in scene): (
        "What digits?",
        "What digits are there?",
        "Which digits do you see?",
        "Read the digits.",
        "What number is it?",
    ),
    lambda scene: " ".join(each.colour for each in scene): (
        "What colours?",
        "Which colours do you see?",
        "What colour is it?",
    ),
    lambda scene: COUNTS[len(scene) - 1]: (
        "How many?",
        "How many digits?",
        "How many digits are there?",
    ),
    in_words: (
        "What is this?",
        "Describe the picture.",
        "What do you see?",
    ),
}
DIGIT_AT = ("What is the {place}?", "What is the {place} digit?", "Which digit is {place}?")
COLOUR_AT = ("What colour is the {place}?", "What colour is the {place} digit?")
WITHOUT_PICTURE = ("Hello", "Hi", "What digits?", "How many?", "What is this?")


def ask(scene: Scene, rng: random.Random) -> Turn:
    """A question about a picture; in half of them about one of its digits."""
    if rng.random() < 0.5:
        answer = rng.choice(list(WHOLE))
        return Turn(rng.choice(WHOLE[answer]), answer(scene))
    place = rng.randrange(len(PLACES))
    words, of = rng.choice(((DIGIT_AT, "digit"), (COLOUR_AT, "colour")))
    question = rng.choice(words).format(place=PLACES[place])
    return Turn(question, answer_at(scene, place, of))


def answer_at(scene: Scene, place: int, of: str) -> str:
    """The digit or the colour at a place, counted from 0; or that there is none."""
    if place < len(scene):
        return getattr(scene[place], of)
    return f"there {'is' if len(scene) == 1 else 'are'} only {COUNTS[len(scene) - 1]}"


def all_words() -> list[str]:
    """Every question and answer, for a vocabulary."""
    rng = random.Random(0)
    texts = [SYSTEM, GREETING, *WITHOUT_PICTURE]
    pairs = [Digit(colour, digit) for colour in COLOURS for digit in DIGITS]
    for scene in ([first, *rng.choices(pairs, k=k)] for first in pairs for k in range(3)):
        texts += [words for turn in converse(scene, rng) for words in turn]
        texts += [question for questions in WHOLE.values() for question in questions]
    for place in PLACES:
        texts += [question.format(place=place) for question in DIGIT_AT + COLOUR_AT]
    return texts


def converse(scene: Scene | None, rng: random.Random) -> list[Turn]:
    """One to three turns about a picture, or one without any."""
    if scene is None:
        return [Turn(rng.choice(WITHOUT_PICTURE), GREETING)]
    return [ask(scene, rng) for _ in range(rng.randint(1, 3))]


def choose(samples: Samples, count: int, rng: random.Random) -> tuple[Tensor, list[Scene]]:
    """Scenes of one to three digits, as many of each: indices into samples, one after the other,
    and the scenes in words."""
    sizes = [1 + i % len(COUNTS) for i in range(count)]
    rng.shuffle(sizes)
    chosen = torch.tensor([rng.randrange(len(samples.digit)) for _ in range(sum(sizes))])
    words = [
        Digit(COLOURS[colour], DIGITS[digit])
        for colour, digit in zip(
            samples.colour[chosen].tolist(), samples.digit[chosen].tolist(), strict=True
        )
    ]
    scenes, start = [], 0
    for size in sizes:
        scenes.append(words[start : start + size])
        start += size
    return chosen, scenes


def tile(pictures: Tensor, scenes: Sequence[Scene]) -> list[Tensor]:
    """Tiles of each scene, (n, 3, S, S): a tile a digit, and of several the whole as a thumbnail.

    Args:
        pictures: (digits of all scenes, 3, S, S) in 0..1.
    """
    tiles = []
    for parts in pictures.split([len(scene) for scene in scenes]):
        if len(parts) > 1:
            side = parts.shape[-1]
            whole = torch.cat(list(parts), dim=-1)[None]
            small = F.interpolate(whole, (side, side), mode="bicubic", antialias=True)
            parts = torch.cat((parts, small.clamp(0, 1)))
        tiles.append(parts)
    return tiles


def draw_scenes(
    samples: Samples, count: int, side: int, rng: random.Random, generator: torch.Generator
) -> tuple[list[Tensor], list[Scene]]:
    """`count` varied scenes: the tiles of each, (n, 3, side, side) in 0..1, and their words."""
    chosen, scenes = choose(samples, count, rng)
    picked = Samples(*(field[chosen] for field in samples))
    return tile(draw_varied(picked, side, generator), scenes), scenes
