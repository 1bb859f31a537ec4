"""The way to the embedded model and to its held-out pictures."""

import json

import pytest
from PIL import Image

from internvl_engine import InternVLProcessor
from internvl_engine.assets import COLOURS, DIGITS, LABELS, SHEET, held_out, nano_directory


def test_held_out_pictures_are_the_tiles_of_the_sheet():
    images, pairs = held_out()
    labels = json.loads((nano_directory() / LABELS).read_text())
    sheet = Image.open(nano_directory() / SHEET)
    assert len(images) == len(pairs) == len(labels["tiles"]) == 360
    side, columns = labels["side"], labels["columns"]
    for index in (0, columns - 1, columns, 359):  # the corners, and where a row ends
        row, column = divmod(index, columns)
        x, y = column * side, row * side
        assert images[index].tobytes() == sheet.crop((x, y, x + side, y + side)).tobytes()
        assert list(pairs[index]) == labels["tiles"][index]


def test_every_digit_is_held_out_equally_often_and_in_every_colour():
    _, pairs = held_out()
    for digit in DIGITS:
        colours = [colour for colour, other in pairs if other == digit]
        assert len(colours) == 36
        assert {colours.count(colour) for colour in COLOURS} == {7, 8}


def test_the_ink_of_a_tile_has_the_colour_of_its_label():
    inks = {"red": "100", "yellow": "110", "green": "010", "blue": "001", "violet": "101"}
    images, pairs = held_out()
    for image, (colour, _) in zip(images, pairs, strict=True):
        brightest = [high for _, high in image.getextrema()]
        middle = 160  # a channel of an ink lies clearly above or below it
        assert "".join("01"[value > middle] for value in brightest) == inks[colour]


def test_photos_are_named_after_what_they_show():
    names = {path.stem for path in (nano_directory() / "samples").glob("*.png")}
    assert len(names) == 5
    for name in names:
        colour, digit = name.split("-")
        assert colour in COLOURS
        assert digit in DIGITS


def test_a_sheet_that_does_not_fit_its_labels_is_refused(tmp_path):
    Image.new("RGB", (64, 32)).save(tmp_path / SHEET)
    labels = {"side": 32, "columns": 2, "tiles": [["red", "one"], ["blue", "two"]]}
    (tmp_path / LABELS).write_text(json.dumps(labels))
    assert held_out(tmp_path)[1] == [("red", "one"), ("blue", "two")]
    labels["tiles"].append(["green", "six"])
    (tmp_path / LABELS).write_text(json.dumps(labels))
    with pytest.raises(ValueError, match="64 x 64 pixels for 3 tiles of 32, got 64 x 32"):
        held_out(tmp_path)
    with pytest.raises(FileNotFoundError):
        held_out(tmp_path / "nowhere")


def test_the_embedded_folder_is_one_that_the_processor_writes(tmp_path):
    """AutoImageProcessor then finds ours, and no namesake's."""
    InternVLProcessor.from_pretrained(nano_directory()).save_pretrained(tmp_path)
    for name in ("processor_config.json", "tokenizer.model"):
        assert (tmp_path / name).read_bytes() == (nano_directory() / name).read_bytes()
