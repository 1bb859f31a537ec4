"""Tiles of chat models: grids, pixels and errors, against the published implementation's."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tiny_chat import picture

from internvl_engine.processing import ImageError, InternVLTileProcessor
from internvl_engine.processing.tiles import choose_grid, grids

GOLDEN = Path(__file__).parents[1] / "golden" / "chat"
CASES = json.loads((GOLDEN / "tiles.json").read_text())


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN / "tiles.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return json.loads(file.metadata()["golden"])["images"], tensors


@pytest.mark.golden
@pytest.mark.parametrize("bounds", CASES["ratio_order"])
def test_grids_come_in_the_published_order(bounds):
    expected = [tuple(grid) for grid in CASES["ratio_order"][bounds]]
    assert list(grids(*map(int, bounds.split(",")))) == expected


@pytest.mark.golden
def test_grids_of_all_sizes():
    for case in CASES["cases"]:
        size, bounds = (case["width"], case["height"]), (case["min_num"], case["max_num"])
        columns, rows = choose_grid(*size, *bounds, case["image_size"])
        assert [columns, rows] == case["grid"], case
        thumbnail = case["use_thumbnail"] and columns * rows > 1
        assert columns * rows + thumbnail == case["num_tiles"], case


@pytest.mark.golden
@pytest.mark.parametrize("name", ["wide", "tall", "square", "grey_alpha"])
def test_pixels_are_the_published_ones(golden, name):
    images, tensors = golden
    image, given = tensors[f"in.{name}"].numpy(), images[name]
    options = {"min_tiles": given["min_num"], "max_tiles": given["max_num"]}
    options["use_thumbnail"] = given["use_thumbnail"]
    processor = InternVLTileProcessor(given["image_size"], **options)
    (tiles,) = processor.tiles(image)
    assert torch.equal(tiles, tensors[f"out.{name}.tiles"])
    values, counts = processor(image)
    assert counts == [given["num_tiles"]]
    torch.testing.assert_close(values.mean((2, 3)), torch.tensor(given["mean"]))
    torch.testing.assert_close(values.flatten(2).std(2), torch.tensor(given["std"]))
    if f"out.{name}.pixel_values" in tensors:
        torch.testing.assert_close(values[:2], tensors[f"out.{name}.pixel_values"])
    for key, pad in (("single", False), ("pad2square", True)):
        whole = InternVLTileProcessor(given["image_size"], dynamic=False, pad2square=pad)
        (tile,) = whole.tiles(image)
        assert torch.equal(tile[0], tensors[f"out.{name}.{key}"])


def test_images_in_all_their_forms_give_the_same_tiles(tmp_path):
    image = Image.fromarray(picture())
    image.save(tmp_path / "a.png")
    processor = InternVLTileProcessor(28, max_tiles=4)
    for source in (picture(), image, tmp_path / "a.png", (tmp_path / "a.png").read_bytes()):
        (tiles,) = processor.tiles(source)
        assert tiles.shape == (3, 28, 28, 3)
        assert torch.equal(tiles, processor.tiles([picture()])[0])


def test_photos_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(60, 30)).save(tmp_path / "a.png", exif=exif)
    turned = Image.fromarray(picture(60, 30)).transpose(Image.Transpose.ROTATE_270)
    processor = InternVLTileProcessor(28, max_tiles=4)
    assert torch.equal(processor.tiles(tmp_path / "a.png")[0], processor.tiles(turned)[0])


def test_several_images_keep_their_order_and_their_errors_a_name(tmp_path):
    processor = InternVLTileProcessor(28, max_tiles=4)
    several = [picture(60, 30, 1), picture(20, 20, 2), picture(30, 60, 3)]
    values, counts = processor(several, workers=3, dtype=torch.bfloat16)
    assert counts == [3, 1, 3] and values.dtype == torch.bfloat16
    assert torch.equal(values[3:4], processor(several[1], dtype=torch.bfloat16)[0])
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(ImageError, match="image 1: .*broken.jpg"):
        processor([several[0], tmp_path / "broken.jpg"])
    with pytest.raises(FileNotFoundError, match="image 0: .*gone.jpg"):
        processor("gone.jpg")


def test_no_images_give_no_tiles():
    values, counts = InternVLTileProcessor(28)([])
    assert values.shape == (0, 3, 28, 28) and counts == []


def test_limits_of_a_call():
    processor = InternVLTileProcessor(28, min_tiles=2, max_tiles=12, use_thumbnail=False)
    assert len(processor.tiles(picture(90, 30), max_tiles=3)[0]) == 3
    assert len(processor.tiles(picture(90, 30), max_tiles=1)[0]) == 1  # below min_tiles, too
    assert len(processor.frames(picture(90, 30))[0]) == 1


@pytest.mark.parametrize("options", [
    {"size": 0}, {"size": True}, {"max_tiles": 0}, {"max_tiles": 2000}, {"max_tiles": 1.5},
    {"min_tiles": 3, "max_tiles": 2}, {"mean": (0.5,)}, {"std": (0, 1, 1)},
])  # fmt: skip
def test_settings_that_make_no_sense(options):
    with pytest.raises(ValueError, match="InternVLTileProcessor|max_tiles"):
        InternVLTileProcessor(**options)
    if "max_tiles" in options and "min_tiles" not in options:
        with pytest.raises(ValueError, match="max_tiles must be a whole number"):
            InternVLTileProcessor(28).tiles(picture(), max_tiles=options["max_tiles"])


def test_settings_survive_their_dict():
    processor = InternVLTileProcessor(56, dynamic=False, pad2square=True, mean=(0.1, 0.2, 0.3))
    again = InternVLTileProcessor(**json.loads(json.dumps(processor.to_dict())))
    assert torch.equal(again(picture())[0], processor(picture())[0])
