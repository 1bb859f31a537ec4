"""`internvl demo`: the embedded models on handwriting they never saw, scored and drawn."""

import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..embedding import Mode
    from ..engine import InternVL


CHAT = ("What is this?", "What colour is the first?")  # two turns of a conversation
SCENES = 60
QUESTIONS = {"colour": "what colour is it?", "digit": "what digit is it?"}
MODES: "tuple[Mode, ...]" = ("c", "g")
BATCH = 90
SHOWN = 8  # pictures of every search
NEW_TOKENS = 8  # the longest of its captions has 4 words


@dataclass
class Picture:
    """A held-out picture, what it shows, and what the model made of it."""

    image: "Image"
    colour: str
    digit: str
    caption: str = ""
    answers: dict[str, str] = field(default_factory=dict)
    label: dict[str, str] = field(default_factory=dict)  # by mode
    probability: dict[str, float] = field(default_factory=dict)

    @property
    def truth(self) -> str:
        return f"a {self.colour} {self.digit}"


@dataclass
class Scene:
    """A picture of several held-out digits, and a conversation about it: the turns of `CHAT`.

    truths: the right answers.
    answers: those that the chat model gave.
    """

    image: "Image"
    truths: tuple[str, str]
    answers: tuple[str, str]


@dataclass
class Demo:
    """Everything that was seen, and how well."""

    pictures: list[Picture]
    scenes: list[Scene]
    searches: dict[str, list[tuple[int, float]]]  # query: places of pictures, with their cosines
    accuracy: dict[str, float]
    more: dict[str, float]
    seconds: dict[str, float]
    machine: dict[str, Any]
    parameters: int

    def document(self) -> dict[str, Any]:
        """The object that --json prints."""
        return {
            "accuracy": self.accuracy,
            "more": self.more,
            "counts": {
                "images": len(self.pictures),
                "labels": len({picture.digit for picture in self.pictures}),
                "queries": len(self.searches),
                "scenes": len(self.scenes),
                "parameters": self.parameters,
            },
            "seconds": self.seconds,
            "machine": self.machine,
        }


class _Clock:
    """Seconds of each step, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = round(now - self.last, 4)
        self.last = now


def run(device: str | None = None, dtype: str | None = None) -> Demo:
    """Classifies (C and G), describes, questions and searches all held-out pictures, and talks
    about scenes of them.

    Args:
        device: None is the GPU where there is one.
        dtype: None is float32.
    """
    clock = _Clock()
    from ..assets import held_out
    from ..engine import InternVL
    from .doctor import machine

    clock.lap("import")
    engine = InternVL.nano(device=device, **({"dtype": dtype} if dtype else {}))
    images, pairs = held_out()
    pictures = [
        Picture(image, colour, digit) for image, (colour, digit) in zip(images, pairs, strict=True)
    ]
    clock.lap("load")
    for mode in MODES:
        _classify(engine, pictures, mode)
        clock.lap(f"classify_{mode}")
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "batch_size": BATCH}
    for picture, text in zip(pictures, engine.caption(images, **options), strict=True):
        picture.caption = text
    clock.lap("caption")
    questions = [list(QUESTIONS.values())] * len(images)
    for picture, texts in zip(pictures, engine.answer(images, questions, **options), strict=True):
        picture.answers = dict(zip(QUESTIONS, texts, strict=True))
    clock.lap("answer")
    searches = _search(engine, images, sorted({picture.truth for picture in pictures}))
    clock.lap("index_and_search")
    scenes = _talk(device, dtype)
    clock.lap("chat")
    seconds = clock.seconds | {"all": round(sum(clock.seconds.values()), 4)}
    return Demo(
        pictures,
        scenes,
        searches,
        _accuracy(pictures, scenes, searches),
        _more(pictures, scenes),
        seconds,
        machine(engine),
        engine.num_parameters,
    )


def _classify(engine: "InternVL", pictures: list[Picture], mode: "Mode") -> None:
    """The ten digits, whatever the ink: each is the mean of its prompts in every colour."""
    from ..assets import COLOURS, DIGITS

    images = [picture.image for picture in pictures]
    templates = [f"a {colour} {{}}" for colour in COLOURS]
    options: dict[str, Any] = {"templates": templates, "top_k": 1, "batch_size": BATCH}
    rows = engine.classify(images, DIGITS, mode=mode, **options)
    for picture, ((label, probability),) in zip(pictures, rows, strict=True):
        picture.label[mode], picture.probability[mode] = label, probability


def _search(
    engine: "InternVL", images: "list[Image]", queries: list[str]
) -> dict[str, list[tuple[int, float]]]:
    """The nearest pictures of every query, through an index on disk."""
    with tempfile.TemporaryDirectory() as folder:
        for place, image in enumerate(images):
            image.save(Path(folder) / f"{place}.png", compress_level=1)
        index = engine.index(folder, batch_size=BATCH)
        vectors = engine.encode_text(queries).cpu()
        found = [index.search(engine, vector, SHOWN) for vector in vectors]
    return {
        query: [(int(Path(hit.path).stem), hit.score) for hit in hits]
        for query, hits in zip(queries, found, strict=True)
    }


def _talk(device: str | None, dtype: str | None) -> list[Scene]:
    """Two questions in a row about each scene, to the chat model."""
    from ..assets import held_out_scenes, in_words
    from ..engine import InternVLChat

    engine = InternVLChat.nano(device=device, **({"dtype": dtype} if dtype else {}))
    images, shown = held_out_scenes(SCENES)
    options: dict[str, Any] = {"max_new_tokens": 24, "batch_size": SCENES // 2}
    first = engine.chat(images, [CHAT[0]] * SCENES, return_history=True, **options)
    history = [before for _, before in first]
    second = engine.chat(question=[CHAT[1]] * SCENES, history=history, **options)
    return [
        Scene(image, (in_words(pairs), pairs[0][0]), (text, later))
        for image, pairs, (text, _), later in zip(images, shown, first, second, strict=True)
    ]


def _accuracy(
    pictures: list[Picture],
    scenes: list[Scene],
    searches: dict[str, list[tuple[int, float]]],
) -> dict[str, float]:
    """Shares of 0..1; R@1 is how often the first picture of a query shows what it says."""
    return {
        "zero_shot_c": _share(picture.label["c"] == picture.digit for picture in pictures),
        "zero_shot_g": _share(picture.label["g"] == picture.digit for picture in pictures),
        "caption": _share(picture.caption == picture.truth for picture in pictures),
        "retrieval_r1": _share(
            pictures[hits[0][0]].truth == query for query, hits in searches.items()
        ),
        "chat": _share(scene.answers[0] == scene.truths[0] for scene in scenes),
    }


def _more(pictures: list[Picture], scenes: list[Scene]) -> dict[str, float]:
    answers = {
        f"answer_{name}": _share(
            picture.answers[name] == getattr(picture, name) for picture in pictures
        )
        for name in QUESTIONS
    }
    return answers | {"chat_later": _share(s.answers[1] == s.truths[1] for s in scenes)}


def _share(right: Any) -> float:
    values = list(right)
    return sum(values) / len(values)
