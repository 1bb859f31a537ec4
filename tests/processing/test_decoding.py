"""One RGB picture from every source, mode and file, and an error that names what is none."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import encoded, noise, same
from PIL import Image, ImageOps

from internvl_engine.processing import (
    ImageError,
    InternVLImageProcessor,
    load_image,
)

PHOTOS = {
    kind: encoded(Image.fromarray(noise(24, 30)), kind)
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "JPEG2000")
}


def test_grey_arrays_fill_three_channels_and_alpha_is_dropped():
    grey, colour = noise(9, 7, 0), noise(9, 7, 4)
    for source in (grey, grey[..., None], torch.from_numpy(grey)[None]):
        assert same(load_image(source), np.stack([grey] * 3, axis=-1))
    assert same(load_image(colour), colour[..., :3])
    assert same(load_image(torch.from_numpy(colour).permute(2, 0, 1)), colour[..., :3])


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "RGBX", "LA", "CMYK", "YCbCr", "HSV", "LAB", "PA"]
)
def test_modes_convert_as_the_published_pipelines_do(mode):
    picture = Image.fromarray(noise(12, 10, 4 if mode in ("RGBA", "LA") else 3))
    image = picture.convert("LA" if mode == "PA" else mode)
    if mode == "PA":
        image = Image.merge("LA", image.split()).convert("PA")
    elif mode == "LAB":
        image = Image.frombytes("LAB", (10, 12), noise(12, 10).tobytes())
    assert same(load_image(image), np.asarray(image.convert("RGB")))
    assert image.mode == mode  # the caller's image is left alone


def test_colours_under_transparency_are_kept():
    colours = noise(8, 8, 4)
    colours[..., 3] = 0
    for kind in ("PNG", "TIFF"):
        assert same(load_image(encoded(Image.fromarray(colours), kind)), colours[..., :3])
    premultiplied = Image.new("RGBA", (2, 2), (200, 100, 50, 128)).convert("RGBa")
    assert abs(np.asarray(load_image(premultiplied)).astype(int)[0, 0] - (200, 100, 50)).max() <= 1
    grey = Image.new("LA", (2, 2), (200, 128)).convert("La")
    assert abs(np.asarray(load_image(grey)).astype(int) - 200).max() <= 1


def test_palettes_with_transparency_give_their_colours_without_a_warning():
    image = Image.fromarray(noise(8, 8)).quantize(16)
    expected = np.asarray(image.convert("RGB"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for transparency in (3, bytes(range(16))):
            assert same(load_image(encoded(image, "PNG", transparency=transparency)), expected)
        assert same(load_image(encoded(image, "GIF", transparency=3)), expected)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    grey = np.array([[0, 128, 129, 255], [256, 257, 32768, 65535]], np.uint16)
    expected = np.stack([np.round(grey / 257).astype(np.uint8)] * 3, axis=-1)
    assert expected[..., 0].tolist() == [[0, 0, 1, 1], [1, 1, 128, 255]]
    for kind in ("PNG", "TIFF"):
        assert same(load_image(encoded(Image.fromarray(grey), kind)), expected)
    big_endian = Image.frombytes("I;16B", (4, 2), grey.astype(">u2").tobytes())
    assert same(load_image(big_endian), expected)
    assert same(load_image(Image.fromarray(grey.astype(np.int32))), expected)
    small = np.array([[0, 7, 255]], np.int32)  # 32 bits that hold 8
    assert same(load_image(Image.fromarray(small)), np.stack([small.astype(np.uint8)] * 3, -1))


def test_files_of_other_colour_spaces(tmp_path):
    picture = Image.fromarray(noise(16, 16))
    for kind, mode in (("JPEG", "CMYK"), ("TIFF", "CMYK"), ("TIFF", "LAB"), ("PNG", "1")):
        image = (
            Image.frombytes("LAB", (16, 16), noise(16, 16).tobytes())
            if mode == "LAB"
            else picture.convert(mode)
        )
        data = encoded(image, kind)
        reopened = Image.open(io.BytesIO(data))
        assert reopened.mode == mode
        assert same(load_image(data), np.asarray(reopened.convert("RGB")))


UPRIGHT = {  # from stored pixels to the upright picture, EXIF 2.3, tag 0x0112
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: p.transpose(1, 0, 2)[:, ::-1],
    7: lambda p: p.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda p: p.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", [*UPRIGHT, 0, 9])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_rotated_photos_are_turned_upright(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(kind, {})
    data = encoded(Image.fromarray(noise(6, 10)), kind, exif=exif, **options)
    stored = np.asarray(
        Image.open(io.BytesIO(encoded(Image.fromarray(noise(6, 10)), kind, **options)))
    )
    expected = UPRIGHT.get(orientation, UPRIGHT[1])(stored)
    assert same(load_image(data), expected)
    opened = Image.open(io.BytesIO(data))
    assert same(load_image(opened), expected)
    assert np.array_equal(load_image(opened), expected)  # not turned twice


def turned(orientation: int, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(noise(6, 10)), "PNG", exif=exif, **options)


@pytest.mark.parametrize(
    "derive",
    [
        lambda im: im.transpose(Image.Transpose.ROTATE_270),
        lambda im: im.rotate(-90, expand=True),
        lambda im: im.crop((1, 1, 9, 5)),
        lambda im: im.convert("L"),
        ImageOps.exif_transpose,
    ],
)
def test_a_picture_made_from_an_opened_one_is_taken_as_it_is(derive):
    picture = derive(Image.open(io.BytesIO(turned(6))))
    assert same(load_image(picture), np.asarray(picture.convert("RGB")))


def test_an_image_turned_in_place_is_not_turned_again():
    opened = Image.open(io.BytesIO(turned(6)))
    ImageOps.exif_transpose(opened, in_place=True)
    assert same(load_image(opened), np.asarray(opened))
    assert same(load_image(opened), load_image(turned(6)))


def test_unreadable_exif_leaves_the_photo_as_it_is():
    plain = encoded(Image.fromarray(noise(6, 10)), "JPEG")
    damaged = encoded(
        Image.fromarray(noise(6, 10)), "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xf0zz"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert same(load_image(damaged), np.asarray(load_image(plain)))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_the_first_frame_of_several(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    difference = np.asarray(load_image(data)).astype(int) - np.array([255, 0, 0])
    assert abs(difference).max() <= 2  # JPEG and WebP round
    opened = Image.open(io.BytesIO(data))
    assert opened.n_frames == 2
    opened.seek(1)  # who gives an opened image has chosen the frame
    assert abs(np.asarray(load_image(opened)).astype(int) - np.array([0, 0, 255])).max() <= 2


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 9) + b"IDAT"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_and_absurd_shapes_are_refused_before_decoding(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_header(100_000, 100_000))
    with pytest.raises(ImageError, match="bomb.png: not a readable image: .*exceeds limit"):
        load_image(tmp_path / "bomb.png")
    with pytest.raises(ImageError, match="12000 x 12000 is 144000000 pixels, more than 1000;"):
        load_image(png_header(12_000, 12_000), max_pixels=1000)
    (tmp_path / "line.png").write_bytes(encoded(Image.new("L", (1, 100_000)), "PNG"))
    with pytest.raises(ImageError, match="line.png: 1 x 100000 is longer than 100 to 1"):
        InternVLImageProcessor(8, "classification")(tmp_path / "line.png")
    with pytest.raises(ImageError, match="30 x 9 is longer than 3 to 1"):
        InternVLImageProcessor(8, max_aspect_ratio=3)(noise(9, 30))
    assert InternVLImageProcessor(8, "clip")(noise(1, 100)).shape == (1, 3, 8, 8)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_files_are_errors_that_name_them(tmp_path, kind):
    data = encoded(Image.fromarray(noise(64, 64)), kind)
    for keep in (0, 10, len(data) // 2):
        path = tmp_path / f"cut-{keep}.{kind.lower()}"
        path.write_bytes(data[:keep])
        with pytest.raises(ImageError, match=f"image 1: .*cut-{keep}.* not a readable image"):
            InternVLImageProcessor(8)([noise(9, 9), path])


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(list(PHOTOS)),
    keep=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), max_size=4),
)
def test_damaged_files_give_a_picture_or_an_error_that_names_them(kind, keep, flips):
    data = bytearray(PHOTOS[kind])
    for place, change in flips:
        data[int(place * min(len(data), 200 if change % 2 else len(data)))] ^= change
    data = data[: max(1, round(keep * len(data)))] if keep < 0.9 else data
    processor = InternVLImageProcessor(8, "clip", max_pixels=1_000_000)
    try:
        pixels = processor.squares(bytes(data))
    except ImageError as error:
        assert str(error).startswith("image 0: image given as bytes: ")
    else:
        assert pixels.shape == (1, 8, 8, 3) and pixels.dtype == torch.uint8
