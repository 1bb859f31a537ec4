"""Handwritten digits in coloured ink: the pictures that train_nano.py learns from.

scikit-learn's digits (the test part of UCI's optdigits: 1,797 samples of 8 x 8 grey by 13 people)
are drawn smoothly at any size. The split is stratified: a fixed permutation of each digit's
samples, whose first 36 are held out, so the same people have written on both sides. The colours of
the held-out ones are fixed too.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_engine.assets import COLOURS, DIGITS, LABELS, SHEET

INKS = torch.tensor(
    [[240, 72, 60], [250, 205, 60], [70, 200, 100], [70, 140, 255], [185, 105, 240]]
)  # in the order of COLOURS
GROUND = torch.tensor([20, 22, 32])
MARGIN = 1.25  # the picture's side in sides of the 8 x 8 grid, which the digits fill
CONTRAST = 2.0  # of the ink's edge, which 8 x 8 pixels leave soft
HELD_OUT_EACH = 36  # of each digit
SPLIT_SEED = 14
SIDE, COLUMNS = 56, 24  # of the contact sheet's tiles
PHOTO_SIDE = 224
PHOTOS = ("red seven", "yellow eight", "green three", "blue four", "violet two")


class Samples(NamedTuple):
    """grey (B, 8, 8) in 0..1, digit (B,) and colour (B,): indices into DIGITS and COLOURS."""

    grey: Tensor
    digit: Tensor
    colour: Tensor


def load(validate: bool = False) -> tuple[Samples, Samples]:
    """(training samples, test samples): 1,437 and the 360 held out.

    With `validate` the held-out ones are left alone: the training samples are split again, into
    1,077 and 360, to choose settings by.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    digit = torch.from_numpy(data.target).long()
    grey = torch.from_numpy(data.images).float() / 16
    train, test = split(digit)
    if validate:
        again, part = split(digit[train])
        train, test = train[again], train[part]
    order = torch.arange(len(grey))
    colour = (order + order // len(DIGITS)) % len(COLOURS)  # every digit of `test` in every colour
    train_samples, test_samples = (
        Samples(grey[part], digit[part], colour[: len(part)]) for part in (train, test)
    )
    return train_samples, test_samples


def split(digit: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (training, held out) of samples whose digits are given; see the head of this file."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    train, test = [], []
    for value in range(len(DIGITS)):
        found = (digit == value).nonzero().flatten()
        found = found[torch.randperm(len(found), generator=generator)]
        test.append(found[:HELD_OUT_EACH])
        train.append(found[HELD_OUT_EACH:])
    # Digits take turns, so that a contact sheet is mixed and colours meet every digit.
    return torch.cat(train), torch.stack(test, dim=1).flatten()


def draw(grey: Tensor, ink: Tensor, ground: Tensor, side: int, frame: Tensor) -> Tensor:
    """Pictures (B, 3, side, side) in 0..1.

    Args:
        grey: (B, 8, 8), how much ink there is. ink, ground: (B, 3), colours in 0..255.
        frame: (B, 2, 3), affine, from the picture's coordinates to the grid's, both -1..1.
    """
    grid = F.affine_grid(frame, [len(grey), 1, side, side], align_corners=False)
    stroke = F.grid_sample(grey[:, None], grid, mode="bicubic", align_corners=False)
    stroke = ((stroke - 0.5) * CONTRAST + 0.5).clamp(0, 1)
    ink, ground = ink[..., None, None], ground[..., None, None]
    return (ground + (ink - ground) * stroke).clamp(0, 255) / 255


def draw_plainly(samples: Samples, side: int) -> Tensor:
    """uint8 pictures (B, side, side, 3), upright and in their own colours."""
    count = len(samples.grey)
    frame = MARGIN * torch.eye(2, 3).expand(count, 2, 3)
    ink = INKS[samples.colour].float()
    pictures = draw(samples.grey, ink, GROUND.float().expand(count, 3), side, frame)
    return (pictures * 255).round().byte().permute(0, 2, 3, 1)


def draw_varied(samples: Samples, side: int, generator: torch.Generator) -> Tensor:
    """(B, 3, side, side) in 0..1: turned, slanted, shifted, thicker or thinner, other inks."""

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(len(samples.grey), *shape, generator=generator) - 1

    angle, slant, stretch = 0.22 * uniform(), 0.2 * uniform(), 1 + 0.13 * uniform(2)
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack((cos, -sin + slant, sin, cos), 1).unflatten(1, (2, 2))
    frame = MARGIN * torch.cat((turn * stretch[:, None], 0.14 * uniform(2, 1)), dim=2)
    grey = samples.grey ** torch.exp(0.5 * uniform(1, 1))
    ink = INKS[samples.colour] + 22 * uniform(3)
    pictures = draw(grey, ink, GROUND + 14 * uniform(3), side, frame)
    return (pictures + 0.02 * uniform(3, side, side)).clamp(0, 1)


def save_held_out(samples: Samples, directory: Path) -> None:
    """Writes the contact sheet with its labels, and a few pictures as photos."""
    from PIL import Image

    names = [
        (COLOURS[c], DIGITS[d])
        for c, d in zip(samples.colour.tolist(), samples.digit.tolist(), strict=True)
    ]
    sheet = draw_plainly(samples, SIDE).unflatten(0, (-1, COLUMNS)).transpose(1, 2).flatten(2, 3)
    image = Image.fromarray(sheet.flatten(0, 1).numpy())
    image.save(directory / SHEET, optimize=True)
    labels = {"side": SIDE, "columns": COLUMNS, "tiles": names}
    (directory / LABELS).write_text(json.dumps(labels) + "\n", encoding="utf-8")
    (directory / "samples").mkdir(exist_ok=True)
    photos = draw_plainly(samples, PHOTO_SIDE)
    for photo in PHOTOS:
        colour, digit = photo.split()
        picture = photos[names.index((colour, digit))]
        path = directory / "samples" / f"{colour}-{digit}.png"
        Image.fromarray(picture.numpy()).save(path, optimize=True)
