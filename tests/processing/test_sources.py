"""Every place a picture comes from, and what is refused there, in time and by name."""

import io
import os
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from pictures import encoded, noise, same
from PIL import Image

from internvl_engine.processing import (
    ImageError,
    InternVLImageProcessor,
    load_image,
    read_image_file,
    sources,
)

PNG = encoded(Image.fromarray(noise(24, 30)), "PNG")


def test_one_object_is_read_many_times_and_by_many_threads(tmp_path):
    """Pillow reads lazily: threads that load one image, or move one file, disturb each other."""
    picture = Image.effect_noise((400, 300), 60).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "photo.jpg").write_bytes(data := encoded(picture, "JPEG", exif=exif))
    expected = np.asarray(load_image(data))
    with ThreadPoolExecutor(8) as pool, open(tmp_path / "photo.jpg", "rb") as file:
        for _ in range(6):
            opened = Image.open(io.BytesIO(data))
            for source in (opened, Image.open(tmp_path / "photo.jpg"), io.BytesIO(data), file):
                for found in pool.map(load_image, [source] * 16):
                    assert same(found, expected)
        pair = io.BytesIO(data)  # two images that read one file
        for found in pool.map(load_image, [Image.open(pair), Image.open(pair)] * 4):
            assert same(found, expected)
    processor = InternVLImageProcessor(8)
    rows = processor([Image.open(tmp_path / "photo.jpg")] * 16, workers=8)
    assert torch.equal(rows, processor(data).expand(16, -1, -1, -1))


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("TIFF", {"compression": "tiff_deflate"})])
def test_large_pictures_open_where_the_caller_allows_it(monkeypatch, kind, options):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # in place of a picture of 200 megapixels
    monkeypatch.setattr(sources, "MAX_PIXELS", 1000)
    data = encoded(Image.fromarray(noise(40, 50)), kind, **options)
    with pytest.raises(ImageError, match="exceeds limit of 1000 pixels"):
        load_image(data, max_pixels=1000)
    assert load_image(data, max_pixels=10**9).size == (50, 40)
    assert InternVLImageProcessor(8, max_pixels=10**9)([data] * 9, workers=3).shape[0] == 9
    assert Image.MAX_IMAGE_PIXELS == 500
    with pytest.raises(ImageError, match="cannot identify"):
        load_image(b"no picture", max_pixels=10**9)
    assert Image.MAX_IMAGE_PIXELS == 500


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "it is empty, 0 bytes"),
        (HEIC, "HEIC needs the package pillow-heif: pip install pillow-heif"),
        (b"\0\0\0\x0cJXL \r\n", "JPEG XL"),
        (b"\xff\x0a\0\0", "JPEG XL"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"<?xml version='1.0'?><svg/>", "drawings"),
        (b"%PDF-1.7", "PDF"),
        (b"no picture", "cannot identify its format"),
    ],
)
def test_files_without_a_known_format_are_told_apart(tmp_path, monkeypatch, content, message):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as where it is not installed
    (tmp_path / "photo.jpg").write_bytes(content)
    for source, name in ((tmp_path / "photo.jpg", "photo.jpg"), (content, "given as bytes")):
        with pytest.raises(ImageError, match=f"{name}: not a readable image: .*{message}"):
            load_image(source)


def test_heic_is_read_where_its_package_is_installed(monkeypatch):
    """pillow_heif registers a format with Pillow; so does its stand-in here."""

    def register_heif_opener() -> None:
        Image.register_open(
            "HEIF",
            lambda file, _: Image.open(io.BytesIO(PNG)),
            lambda head: head == HEIC[:16],
        )

    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    package = types.ModuleType("pillow_heif")
    package.register_heif_opener = register_heif_opener
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    assert same(load_image(HEIC), np.asarray(load_image(PNG)))


@pytest.mark.parametrize("text", ["data:image/png;base64," + "A" * 2_600_000, "iVBORw0KGgo" * 300])
def test_encoded_text_is_one_short_line(text):
    with pytest.raises(ImageError, match="characters, not a path; decode it first") as caught:
        InternVLImageProcessor(8)([text])
    assert len(str(caught.value)) < 400


def test_hostile_names_are_escaped_and_bounded():
    for name, error in (("a\x1b[2J\n.jpg", FileNotFoundError), ("a/" * 3000 + "b.jpg", ImageError)):
        with pytest.raises(error) as caught:
            load_image(name)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 300


def test_what_does_not_end_is_refused_in_time(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(200 * 10**9)
    for name, message in (
        ("pipe.jpg", "not a regular file"),
        ("zero.jpg", "not a regular file"),
        ("sparse.jpg", "has 200000000000 bytes"),
        ("", "is a directory"),
    ):
        with pytest.raises(ImageError, match=message):
            read_image_file(tmp_path / name)
        with pytest.raises(ImageError, match=message.replace("has 200000000000 bytes", "identify")):
            load_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such image file"):
        read_image_file(tmp_path / "absent.jpg")
    (tmp_path / "photo.png").write_bytes(PNG)
    assert read_image_file(tmp_path / "photo.png") == PNG
    with open("/dev/zero", "rb") as endless, pytest.raises(ImageError, match="more than 16777224"):
        load_image(endless, max_pixels=1)


def test_streams_of_this_process_are_read(tmp_path):
    """As `internvl caption <(curl ...)` hands a picture over: bash names it /dev/fd/63."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as file:
        file.write(PNG)
    assert same(load_image(f"/dev/fd/{reader}"), np.asarray(load_image(PNG)))
    os.close(reader)
    drops = iter([PNG[:10], PNG[10:11], PNG[11:], b""])
    slow = types.SimpleNamespace(read=lambda size: next(drops), name="slow.png")  # as a socket
    assert same(load_image(slow), np.asarray(load_image(PNG)))


def test_rows_of_data_sets_are_pictures(tmp_path):
    (tmp_path / "photo.png").write_bytes(PNG)
    path, picture = str(tmp_path / "photo.png"), Image.fromarray(noise(24, 30))
    rows = [
        {"bytes": PNG, "path": "gone.png"}, {"bytes": None, "path": path},
        {"image": picture, "label": 3}, {"image": {"bytes": PNG, "path": None}},
        {"img": np.asarray(picture)}, {"jpg": PNG, "__key__": "0"},
    ]  # fmt: skip
    processor = InternVLImageProcessor(8)
    expected = processor(picture).expand(len(rows), -1, -1, -1)
    assert torch.equal(processor(rows), expected)
    assert torch.equal(processor(rows[0]), expected[:1])
    with pytest.raises(ImageError, match="image 1: gone.png: not a readable"):
        processor([picture, {"bytes": b"no", "path": "gone.png"}])


def test_arrays_of_objects_are_several_pictures(tmp_path):
    (tmp_path / "photo.png").write_bytes(PNG)
    pixels = noise(24, 30)
    objects = np.empty(3, object)
    objects[:] = [Image.fromarray(pixels), pixels, PNG]
    processor = InternVLImageProcessor(8)
    expected = processor(pixels).expand(3, -1, -1, -1)
    assert torch.equal(processor(objects), expected)
    assert torch.equal(processor(np.array([str(tmp_path / "photo.png")] * 3)), expected)


def test_what_is_no_image_file_is_named(tmp_path):
    processor = InternVLImageProcessor(8)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "drawing.eps").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    )
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in (
        ("notes.txt", "notes.txt: not a readable image: cannot identify"),
        ("drawing.eps", "drawing.eps: EPS files are programs"),
        ("pipe.png", "pipe.png: is not a regular file"),
        ("", "is a directory"),
    ):
        with pytest.raises(ImageError, match=message) as caught:
            processor(tmp_path / name)
        assert str(tmp_path) in str(caught.value) and isinstance(caught.value, ValueError)
    with pytest.raises(FileNotFoundError, match="image 0: absent.png: no such image file"):
        processor("absent.png")
    with pytest.raises(FileNotFoundError, match="http://host/a.png: .*download it first"):
        processor(["http://host/a.png"])


@pytest.mark.parametrize(
    "source, error, message",
    [
        (np.zeros((0, 5, 3), np.uint8), ImageError, "empty, shape"),
        (torch.zeros(3, 5, 0, dtype=torch.uint8), ImageError, "empty, shape"),
        (np.zeros((5, 5, 3), np.float32), ImageError, r"uint8 \(H, W\).*float32"),
        (np.zeros((3, 5, 5), np.uint8), ImageError, "channels last"),
        (torch.zeros(3, 5, 5), ImageError, "to_images"),
        (torch.zeros(5, 5, 3, dtype=torch.uint8), ImageError, r"uint8 \(3, H, W\)"),
        (Image.new("F", (3, 3)), ImageError, "floating-point"),
        (Image.fromarray(np.array([[-1, 70000]], np.int32)), ImageError, "-1..70000 do not fit"),
        (42, TypeError, "an image must be .* got int"),
        ([[noise(3, 3)]], TypeError, "got list"),
        ([None], TypeError, "image 0: .* got NoneType"),
        ({"image": 1}, TypeError, "got int"),
        ({"label": 1}, TypeError, r"got a dict with keys \['label'\]"),
        (np.full((5, 5, 3), np.nan), ImageError, r"uint8 \(H, W\).*float64"),
        (io.StringIO("a"), ImageError, "is open as text; open it with mode 'rb'"),
        ("a\0.png", ImageError, "null character"),
    ],
)
def test_unusable_sources_are_refused(source, error, message):
    with pytest.raises(error, match=message):
        InternVLImageProcessor(8)(source)
