"""The contact sheet of the demo: what the model saw, said and found, on one page.

Set in Pillow's own scalable font. All lengths are in pixels of a page 1600 wide.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .demo import CHAT

if TYPE_CHECKING:
    from PIL import Image

    from .demo import Demo, Picture

WIDTH, MARGIN, GAP = 1600, 74, 20
COLUMNS, TILE = 8, 164  # 8 tiles and 7 gaps fill the width
ROUND = 14
OVERSAMPLE = 4  # for round corners


@dataclass(frozen=True)
class Palette:
    """Colours of a page; `inks` are those of the words for them."""

    page: str
    text: str
    muted: str
    line: str
    accent: str
    wrong: str
    inks: dict[str, str]


DARK = Palette(
    page="#0c0e14", text="#edeff5", muted="#8990a3", line="#232736", accent="#7aa2ff",
    wrong="#ff6b5e",
    inks={"red": "#f0604f", "yellow": "#f2c94c", "green": "#5fd08a", "blue": "#6ea4ff",
          "violet": "#bd85f2"},
)  # fmt: skip
LIGHT = Palette(
    page="#faf9f6", text="#1a1c23", muted="#6f7484", line="#e2e0d9", accent="#2f5fd0",
    wrong="#c8372b",
    inks={"red": "#c8372b", "yellow": "#9a7400", "green": "#1f8a4c", "blue": "#2a62cf",
          "violet": "#8338c9"},
)  # fmt: skip


class Sheet:
    """A page that grows downwards, drawn from top to bottom.

    Args:
        palette: its colours.
        height: enough for everything; `finish` cuts the rest off.
    """

    def __init__(self, palette: Palette, height: int = 2400) -> None:
        from PIL import Image, ImageDraw

        self.palette = palette
        self.image: Image.Image = Image.new("RGB", (WIDTH, height), palette.page)
        self.draw: ImageDraw.ImageDraw = ImageDraw.Draw(self.image)
        self.y = MARGIN

    def text(
        self, x: float, y: float, words: str, size: int, colour: str = "", anchor: str = "ls"
    ) -> float:
        """Writes on the baseline y; returns the width."""
        from PIL import ImageFont

        font = ImageFont.load_default(size)
        self.draw.text((x, y), words, font=font, fill=colour or self.palette.text, anchor=anchor)
        return font.getlength(words)

    def picture(self, x: int, y: int, image: "Image.Image", outline: str = "") -> int:
        """A picture as high as a tile, with round corners, in an outline where one is given.

        Returns:
            Its width.
        """
        from PIL import Image

        width = TILE * image.width // image.height
        picture = image.resize((width, TILE), Image.Resampling.LANCZOS)
        if outline:
            self.image.paste(outline, (x - 4, y - 4), _round(width + 8, TILE + 8, ROUND + 4))
            inside = _round(width + 4, TILE + 4, ROUND + 2)
            self.image.paste(self.palette.page, (x - 2, y - 2), inside)
        self.image.paste(picture, (x, y), _round(width, TILE, ROUND))
        return width

    def rule(self) -> None:
        """A line across the page."""
        self.draw.line((MARGIN, self.y, WIDTH - MARGIN, self.y), self.palette.line, 2)

    def finish(self) -> "Image.Image":
        """The page up to where it was filled."""
        return self.image.crop((0, 0, WIDTH, self.y + MARGIN))


def draw(demo: "Demo", light: bool = False) -> "Image.Image":
    """The page of a demo, (height, 1600) RGB."""
    sheet = Sheet(LIGHT if light else DARK)
    _head(sheet, demo)
    pictures = demo.pictures
    step = (len(pictures) // (2 * COLUMNS) - 1) | 1  # odd: digits take turns among the pictures
    _title(sheet, "Held-out handwriting", f"one in {step} of {len(pictures)} pictures, unselected; "
           "the caption, then the digit it takes it for")  # fmt: skip
    for start in (0, COLUMNS * step):
        _row(sheet, [pictures[start + i * step] for i in range(COLUMNS)])
    hardest = sorted(pictures, key=_confidence)[:COLUMNS]
    _title(
        sheet, "The hardest", "wrong captions and digits, outlined; then where it was least sure"
    )
    _row(sheet, hardest, truth=True)
    query = _query(demo)
    shown = sum(picture.truth == query for picture in pictures)
    what = f"the best of {len(pictures)}, by cosine; {shown} show it"
    _title(sheet, f"Search: “{query}”", what)
    _hits(sheet, demo, query)
    _title(sheet, "Conversations", f"the chat model, “{CHAT[0]}” and then “{CHAT[1]}”")
    _talks(sheet, demo)
    _questions(sheet, demo)
    return sheet.finish()


def _head(sheet: Sheet, demo: "Demo") -> None:
    palette = sheet.palette
    sheet.y += 44
    sheet.text(MARGIN - 3, sheet.y, "InternVL nano", 60)
    scores = [
        ("zero-shot C", demo.accuracy["zero_shot_c"]),
        ("zero-shot G", demo.accuracy["zero_shot_g"]),
        ("captions", demo.accuracy["caption"]),
        ("search R@1", demo.accuracy["retrieval_r1"]),
    ]
    for place, (name, share) in enumerate(scores):
        right = WIDTH - MARGIN - (len(scores) - 1 - place) * 168
        sheet.text(right, sheet.y, f"{100 * share:.1f}%", 40, anchor="rs")
        sheet.text(right, sheet.y + 32, name, 19, palette.muted, anchor="rs")
    work = sum(s for name, s in demo.seconds.items() if name not in ("import", "load", "all"))
    sheet.text(
        MARGIN,
        sheet.y + 32,
        f"{demo.parameters / 1e6:.2f} million parameters · {len(demo.pictures)} pictures "
        f"classified, described, questioned and searched in {work:.1f} s",
        19,
        palette.muted,
    )
    sheet.y += 68
    sheet.rule()


def _title(sheet: Sheet, words: str, explanation: str) -> None:
    sheet.y += 56
    width = sheet.text(MARGIN, sheet.y, words, 28)
    sheet.text(MARGIN + width + 18, sheet.y, explanation, 18, sheet.palette.muted)
    sheet.y += 24


def _row(sheet: Sheet, pictures: "Sequence[Picture]", truth: bool = False) -> None:
    palette = sheet.palette
    for place, picture in enumerate(pictures):
        x = MARGIN + place * (TILE + GAP)
        right = picture.caption == picture.truth and picture.label["c"] == picture.digit
        sheet.picture(x, sheet.y, picture.image, "" if right else palette.wrong)
        below = sheet.y + TILE + 30
        _caption(sheet, x, below, picture)
        probability = picture.probability["c"]
        said_right = picture.label["c"] == picture.digit
        colour = palette.accent if said_right else palette.wrong
        sheet.text(x, below + 25, picture.label["c"], 17, palette.muted if said_right else colour)
        sheet.text(x + TILE, below + 25, _percent(probability), 17, palette.muted, anchor="rs")
        bar = (x, below + 37, x + TILE, below + 41)
        sheet.draw.rounded_rectangle(bar, 2, palette.line)
        sheet.draw.rounded_rectangle((*bar[:2], x + max(TILE * probability, 4), bar[3]), 2, colour)
        if truth and not right:
            sheet.text(x, below + 64, f"it is {picture.truth}", 16, palette.wrong)
    wrong = any(p.caption != p.truth or p.label["c"] != p.digit for p in pictures)
    sheet.y += TILE + 30 + 41 + (30 if truth and wrong else 6) + 24


def _caption(sheet: Sheet, x: float, y: float, picture: "Picture") -> None:
    """The caption, its colour in that colour, as large as fits."""
    from PIL import ImageFont

    size = 21
    while size > 11 and ImageFont.load_default(size).getlength(picture.caption) > TILE:
        size -= 1
    for word in picture.caption.split():
        colour = sheet.palette.inks.get(word, sheet.palette.text)
        x += sheet.text(x, y, word, size, colour) + size * 0.28


def _hits(sheet: Sheet, demo: "Demo", query: str) -> None:
    palette = sheet.palette
    for place, (number, score) in enumerate(demo.searches[query]):
        x = MARGIN + place * (TILE + GAP)
        picture = demo.pictures[number]
        right = picture.truth == query
        sheet.picture(x, sheet.y, picture.image, "" if right else palette.wrong)
        y = sheet.y + TILE + 30
        sheet.text(x, y, f"{place + 1}", 19)
        sheet.text(x + TILE, y, f"{score:.3f}", 17, palette.muted, anchor="rs")
    sheet.y += TILE + 40


def _talks(sheet: Sheet, demo: "Demo") -> None:
    """Scenes of two and three digits, as many as fit into a line, with both answers."""
    palette, x = sheet.palette, MARGIN
    for scene in demo.scenes:
        width = TILE * scene.image.width // scene.image.height
        if width == TILE or x + width > WIDTH - MARGIN:
            continue
        outline = "" if scene.answers == scene.truths else palette.wrong
        sheet.picture(x, sheet.y, scene.image, outline)
        for line, answer in enumerate(scene.answers):
            place = float(x)
            for word in answer.split():
                colour = palette.inks.get(word, palette.text)
                place += sheet.text(place, sheet.y + TILE + 28 + 24 * line, word, 17, colour) + 5
        x += width + GAP
    sheet.y += TILE + 64


def _questions(sheet: Sheet, demo: "Demo") -> None:
    sheet.y += 30
    sheet.rule()
    sheet.y += 44
    x = float(MARGIN)
    for name, question in (("colour", "“What colour is it?”"), ("digit", "“What digit is it?”")):
        x += sheet.text(x, sheet.y, question, 20) + 12
        words = f"{_percent(demo.more[f'answer_{name}'])} right"
        x += sheet.text(x, sheet.y, words, 20, sheet.palette.accent) + 40
    machine = demo.machine
    words = f"{machine['device']} · torch {machine['torch']} · {machine['dtype']}"
    sheet.text(WIDTH - MARGIN, sheet.y, words, 17, sheet.palette.muted, anchor="rs")


def _query(demo: "Demo") -> str:
    """The first query in the middle of the alphabet: no matter how well it went."""
    return sorted(demo.searches)[len(demo.searches) // 2]


def _confidence(picture: "Picture") -> tuple[int, float]:
    right = (picture.caption == picture.truth) + (picture.label["c"] == picture.digit)
    return right, picture.probability["c"]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _round(width: int, height: int, radius: int) -> "Image.Image":
    """The mask of a rectangle with round corners."""
    from PIL import Image, ImageDraw

    mask = Image.new("L", (width * OVERSAMPLE, height * OVERSAMPLE))
    corners = (0, 0, width * OVERSAMPLE - 1, height * OVERSAMPLE - 1)
    ImageDraw.Draw(mask).rounded_rectangle(corners, radius * OVERSAMPLE, 255)
    return mask.resize((width, height), Image.Resampling.LANCZOS)
