"""Each picture is what it was when it was handed over, whoever else holds the object."""

import io
import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from tiny_engine import pictures, tiny_engine

from internvl_engine.embedding.batches import Outcome, image_batches
from internvl_engine.embedding.pictures import NamedBytes, settled
from internvl_engine.processing import ImageError

SQUARES = [np.full((30, 30, 3), 40 * i, np.uint8) for i in range(5)]


def encoded(array: np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def one_array(folder):
    buffer = np.empty_like(SQUARES[0])
    for square in SQUARES:
        buffer[:] = square
        yield buffer


def one_tensor(folder):
    buffer = torch.empty(3, 30, 30, dtype=torch.uint8)
    for square in SQUARES:
        yield buffer.copy_(torch.from_numpy(square).permute(2, 0, 1))


def one_image(folder):
    image = Image.new("RGB", (30, 30))
    for square in SQUARES:
        image.paste(Image.fromarray(square))
        yield image


def one_opened_image(folder):
    """Not decoded when it is handed over the first time, changed later."""
    image = Image.open(io.BytesIO(encoded(SQUARES[0])))
    yield image
    for square in SQUARES[1:]:
        image.paste(Image.fromarray(square))
        yield image


def frames(folder):
    pages = [Image.fromarray(square) for square in SQUARES]
    pages[0].save(folder / "a.tiff", save_all=True, append_images=pages[1:])
    return ImageSequence.Iterator(Image.open(folder / "a.tiff"))


def one_file_object(folder):
    file = io.BytesIO()
    for square in SQUARES:
        file.seek(0)
        file.truncate()
        file.write(encoded(square))
        yield file


def one_bytearray(folder):
    buffer = bytearray()
    for square in SQUARES:
        buffer[:] = encoded(square)
        yield buffer


def one_path(folder):
    for square in SQUARES:
        Image.fromarray(square).save(folder / "a.png")
        yield folder / "a.png"


def one_row(folder):
    row = {"label": 1}
    for square in SQUARES:
        row["image"] = Image.fromarray(square)
        yield row


def deleted_files(folder):
    for square in SQUARES:
        Image.fromarray(square).save(folder / "a.png")
        yield str(folder / "a.png")
        (folder / "a.png").unlink()


SOURCES = [
    one_array, one_tensor, one_image, one_opened_image, frames, one_file_object, one_bytearray,
    one_path, one_row, deleted_files,
]  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("source", SOURCES, ids=[source.__name__ for source in SOURCES])
def test_one_buffer_again_and_again(source, batch_size, tmp_path):
    processor = tiny_engine().processor.image_processor
    batches = image_batches(processor, source(tmp_path), batch_size, torch.float32)
    found = torch.cat([batch.pixels for batch in batches])
    assert torch.equal(found, processor(SQUARES))


def test_what_an_iterator_opens_is_decoded_by_other_threads(tmp_path):
    """Its file is copied, not its pixels; where something was done to it, its pixels are."""
    path = tmp_path / "a.jpg"
    picture = np.repeat(np.repeat(pictures(1)[0], 9, 0), 9, 1)
    path.write_bytes(encoded(picture, "JPEG", exif=exif(6)))
    assert isinstance(settled(path), NamedBytes)
    with Image.open(path) as image:
        assert isinstance(settled(image), NamedBytes) and settled(image).name == str(path)
        assert image.tile  # as it was: neither read nor closed
    changes = (lambda i: i.load(), lambda i: i.draft("RGB", (20, 20)), drop_orientation)
    for change, shape in zip(changes, [picture.shape[1::-1], None, picture.shape[:2]], strict=True):
        with Image.open(path) as image:
            change(image)
            found = settled(image)
            assert isinstance(found, np.ndarray) and found.dtype == np.uint8
            assert shape is None or found.shape[:2] == shape  # upright


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def drop_orientation(image) -> None:
    del image.getexif()[0x0112]


def test_one_object_many_times(tmp_path):
    engine, path = tiny_engine(), tmp_path / "a.jpg"
    path.write_bytes(encoded(np.repeat(pictures(1)[0], 20, 0), "JPEG"))
    expected = engine.encode_image(path)
    with open(path, "rb") as file:
        memory = io.BytesIO(path.read_bytes())
        for source in (Image.open(path), memory, file):
            found = engine.encode_image([source] * 16)
            assert torch.allclose(found, expected.expand_as(found), atol=2e-6)


def test_one_object_in_many_threads(tmp_path):
    engine, path, wrong = tiny_engine(), tmp_path / "a.jpg", []
    path.write_bytes(encoded(np.repeat(pictures(1)[0], 20, 0), "JPEG", exif=exif(6)))
    expected = engine.encode_image(path)
    for source in (Image.open(path), io.BytesIO(path.read_bytes())):

        def run(source=source):
            try:
                for form in ([source], iter([source])):
                    if not torch.equal(engine.encode_image(form), expected):
                        wrong.append("another row")
            except Exception as error:  # noqa: BLE001
                wrong.append(error)

        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_rows_of_data_sets():
    engine, squares = tiny_engine(), SQUARES[:3]
    expected = engine.encode_image(squares)
    images = [Image.fromarray(square) for square in squares]
    array = np.empty(3, dtype=object)
    array[:] = images
    stored = [{"bytes": encoded(square), "path": None} for square in squares]
    for form in (stored, [{"image": i, "label": 0} for i in images], array, (r for r in stored)):
        assert torch.equal(engine.encode_image(form), expected)
    assert torch.equal(engine.encode_image(stored[0]), engine.encode_image(squares[0]))


def test_errors_are_kept_with_their_numbers(tmp_path):
    processor, missing = tiny_engine().processor.image_processor, tmp_path / "nothing.jpg"
    sources = [SQUARES[0], b"no image", SQUARES[1], missing, 5, SQUARES[2]]
    batches = list(image_batches(processor, sources, 4, torch.float32, keep_errors=True))
    assert [batch.numbers for batch in batches] == [[0, 2], [5]]
    assert torch.equal(torch.cat([b.pixels for b in batches]), processor(SQUARES[:3]))
    broken = [outcome for batch in batches for outcome in batch.broken]
    assert [(o.number, type(o.error)) for o in broken] == [
        (1, ImageError), (3, FileNotFoundError), (4, TypeError)
    ]  # fmt: skip
    assert all(str(o.error).startswith(f"image {o.number}: ") for o in broken)
    (batch,) = image_batches(processor, [b"", b""], 4, torch.float32, keep_errors=True)
    assert batch.pixels.shape == (0, 3, 28, 28) and len(batch.broken) == 2


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    (only,) = tiny_engine().each_image(iter([tmp_path / "a.jpg"]))
    assert isinstance(only, Outcome) and "not a regular file" in str(only.error)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, "a"])
def test_batch_sizes_are_numbers(batch_size):
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got"):
        tiny_engine().encode_image(SQUARES, batch_size=batch_size)


def test_batches_of_any_size():
    engine = tiny_engine()
    expected = engine.encode_image(SQUARES)
    for batch_size in (1, np.int64(2), 10**30):
        assert torch.allclose(engine.encode_image(SQUARES, batch_size=batch_size), expected,
                              atol=2e-6)  # fmt: skip
