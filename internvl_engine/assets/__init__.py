"""The embedded models, and the handwriting they never saw.

`nano/` holds a complete InternVL of half a million parameters, trained by examples/train_nano.py on
handwritten digits in five colours of ink, in the layout of every other checkpoint. Beside it lie
360 held-out pictures as the tiles of one contact sheet, and a few as photos in `nano/samples/`.
`nano_chat/` holds a chat model that examples/train_nano_chat.py assembled from its vision tower.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

COLOURS = ("red", "yellow", "green", "blue", "violet")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHEET, LABELS = "held_out.png", "held_out.json"


def nano_directory() -> Path:
    """The directory of the embedded checkpoint, for any `from_pretrained`."""
    return Path(__file__).parent / "nano"


def nano_chat_directory() -> Path:
    """The directory of the embedded chat model, for any `from_pretrained`.

    Raises:
        FileNotFoundError: this installation has none.
    """
    folder = Path(__file__).parent / "nano_chat"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            "this installation has no embedded chat model; give the directory or the hub id of one"
        )
    return folder


def held_out(directory: Path | None = None) -> tuple[list["Image"], list[tuple[str, str]]]:
    """The held-out pictures and what they show.

    Args:
        directory: of a checkpoint that examples/train_nano.py wrote; None is the embedded one.

    Returns:
        RGB images, all of one size, and as many (colour, digit) pairs of `COLOURS` and `DIGITS`.

    Raises:
        FileNotFoundError: the sheet or its labels are not there.
        ValueError: they do not belong together.
    """
    from PIL import Image

    directory = directory or nano_directory()
    labels = json.loads((directory / LABELS).read_text(encoding="utf-8"))
    pairs = [(colour, digit) for colour, digit in labels["tiles"]]
    side, columns = labels["side"], labels["columns"]
    rows = -(-len(pairs) // columns)
    with Image.open(directory / SHEET) as opened:
        sheet = opened.convert("RGB")
    if sheet.size != (columns * side, rows * side):
        raise ValueError(
            f"held_out: {directory / SHEET} must be {columns * side} x {rows * side} pixels for "
            f"{len(pairs)} tiles of {side}, got {sheet.width} x {sheet.height}"
        )
    corners = [(i % columns * side, i // columns * side) for i in range(len(pairs))]
    return [sheet.crop((x, y, x + side, y + side)) for x, y in corners], pairs


def held_out_scenes(count: int = 180) -> tuple[list["Image"], list[list[tuple[str, str]]]]:
    """Pictures of one, two or three held-out digits side by side, for the chat model.

    Args:
        count: how many; there are as many of each length.

    Returns:
        RGB images, and for each the (colour, digit) pairs that it shows from left to right.
    """
    from PIL import Image

    digits, pairs = held_out()
    side = digits[0].height
    scenes, shown = [], []
    for number in range(count):
        chosen = [(number + step) % len(digits) for step in (0, 97, 211)[: 1 + number % 3]]
        scene = Image.new("RGB", (side * len(chosen), side))
        for place, index in enumerate(chosen):
            scene.paste(digits[index], (place * side, 0))
        scenes.append(scene)
        shown.append([pairs[index] for index in chosen])
    return scenes, shown


def in_words(pairs: Sequence[tuple[str, str]]) -> str:
    """What the chat model should call a scene: "a red three, a blue one and a green seven"."""
    *most, last = (f"a {colour} {digit}" for colour, digit in pairs)
    return f"{', '.join(most)} and {last}" if most else last
