"""Pixels: exactly the published pipelines', from every kind of source."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import noise, same
from PIL import Image
from safetensors.torch import load_file

from internvl_engine.processing import ImageError, InternVLImageProcessor, load_image
from internvl_engine.processing.images import fit

GOLDEN = Path(__file__).parents[1] / "golden"
GEOMETRIES = {
    "retrieval": "retrieval",
    "classification": "classification",
    "clip_processor": "clip",
}


@pytest.mark.golden
def test_published_pixels_of_every_pipeline():
    golden = load_file(GOLDEN / "images.safetensors")
    cases = [name for name in golden if name.startswith("out.")]
    assert len(cases) == 21
    for name in cases:
        _, image, pipeline, side = name.split(".")
        processor = InternVLImageProcessor(int(side), GEOMETRIES[pipeline])
        pixels = processor.squares(golden[f"in.{image}"].numpy())
        assert torch.equal(pixels[0].permute(2, 0, 1), golden[name]), name


def test_values_are_normalised_in_float32_and_come_back():
    processor = InternVLImageProcessor(20)
    pixels = noise(20, 20)
    values = processor(pixels)
    mean, std = torch.tensor(processor.mean), torch.tensor(processor.std)
    expected = ((torch.from_numpy(pixels).float() / 255 - mean) / std).permute(2, 0, 1)
    assert values.shape == (1, 3, 20, 20) and values.dtype == torch.float32
    assert torch.equal(values[0], expected)  # the same operations in the same order
    assert torch.equal(processor(pixels, dtype=torch.bfloat16)[0], expected.bfloat16())
    assert values.is_contiguous()
    assert same(processor.to_images(values)[0], pixels)
    assert same(processor.to_images(values[0])[0], pixels)
    with pytest.raises(ValueError, match=r"needs normalised values .* got torch.uint8"):
        processor.to_images(torch.zeros(3, 4, 4, dtype=torch.uint8))


def test_own_mean_and_deviation():
    processor = InternVLImageProcessor(2, mean=(0, 0.5, 1), std=(1, 0.5, 2))
    values = processor(np.full((2, 2, 3), 255, np.uint8))
    assert values[0, :, 0, 0].tolist() == [1, 1, 0]
    assert same(processor.to_images(values)[0], np.full((2, 2, 3), 255, np.uint8))


def test_every_source_gives_the_same_pixels(tmp_path):
    pixels = noise(30, 41)
    image = Image.fromarray(pixels)
    path = tmp_path / "photo.png"
    image.save(path)
    data = path.read_bytes()
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    processor = InternVLImageProcessor(16, "clip")
    expected = processor(pixels)
    sources = [image, str(path), path, data, bytearray(data), memoryview(data), io.BytesIO(data),
               tensor, tensor.contiguous(), Image.open(path),
               np.ascontiguousarray(pixels[:, ::-1])[:, ::-1]]  # fmt: skip
    for source in sources:
        assert torch.equal(processor(source), expected), type(source)
    with path.open("rb") as file:
        assert torch.equal(processor(file), expected)
    many = expected.expand(3, -1, -1, -1)
    assert torch.equal(processor([path, pixels, tensor]), many)
    assert torch.equal(processor(path for _ in range(3)), many)
    assert torch.equal(processor(np.stack([pixels] * 3)), many)
    assert torch.equal(processor(torch.stack([tensor] * 3)), many)
    assert processor([]).shape == (0, 3, 16, 16)


def test_defaults_of_dtype_and_device_change_nothing():
    processor = InternVLImageProcessor(16, "clip")
    expected, nothing = processor(noise(30, 41)), processor([])
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert torch.equal(processor(noise(30, 41)), expected)
            assert processor([]).device == nothing.device
            assert same(processor.to_images(expected)[0], processor.to_images(expected)[0])
    finally:
        torch.set_default_dtype(torch.float32)


def test_threads_keep_the_order_and_the_pixels():
    photos = [noise(40 + i, 50, seed=i) for i in range(12)]
    processor = InternVLImageProcessor(24, "classification")
    assert torch.equal(processor(photos, workers=4), processor(photos))
    with pytest.raises(ImageError, match="image 2: image given as bytes: not a readable image"):
        processor([*photos[:2], b"no photo", photos[3]], workers=4)
    with pytest.raises(ImageError, match="image 12: "):
        processor([*photos[:2], b"no photo"], first=10)  # a part of a longer list


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": 0}, "size must be"),
        ({"size": 2.5}, "size must be"),
        ({"geometry": "square"}, "geometry must be one of"),
        ({"mean": (1, 2)}, "three means"),
        ({"std": (1, 0, 1)}, "positive deviations"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        InternVLImageProcessor(**options)


def test_the_crops_of_the_two_geometries_differ_by_their_rounding():
    pixels = noise(10, 13)  # 3 too many: half of it is 1.5
    image = Image.fromarray(pixels)
    assert same(fit(image, 10, "clip"), pixels[:, 1:11])
    assert same(fit(image, 10, "classification"), pixels[:, 2:12])


@settings(max_examples=200, deadline=None)
@given(
    width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(1, 40),
    mode=st.sampled_from(["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I;16", "HSV"]),
    geometry=st.sampled_from(list(GEOMETRIES.values())),
)  # fmt: skip
def test_any_size_and_mode_fits(width, height, size, mode, geometry):
    if mode == "I;16":
        grey = noise(height, width, 0).astype(np.uint16) * 257
        image, colours = Image.fromarray(grey), Image.fromarray(noise(height, width, 0))
    else:
        image = colours = Image.fromarray(noise(height, width)).convert(mode)
    got = InternVLImageProcessor(size, geometry).squares(image)[0].numpy()
    colours = colours.convert("RGB")
    if geometry == "retrieval":
        expected = np.asarray(colours.resize((size, size), Image.Resampling.BICUBIC))
    else:
        ratio = max(width, height) / min(width, height)
        sides = [round(size * ratio) if n > min(width, height) else size for n in (width, height)]
        exact = [int(size * n / min(width, height)) for n in (width, height)]
        assert max(abs(a - b) for a, b in zip(sides, exact, strict=True)) <= 1
        resized = np.asarray(colours.resize(exact, Image.Resampling.BICUBIC))
        half = round if geometry == "classification" else int
        top, left = half((exact[1] - size) / 2), half((exact[0] - size) / 2)
        expected = resized[top : top + size, left : left + size]
    assert np.array_equal(got, expected)


def test_video_frames_are_taken_from_the_middle_of_equal_parts():
    frames = [np.full((4, 4, 3), i, np.uint8) for i in range(10)]
    processor = InternVLImageProcessor(4, mean=(0, 0, 0), std=(1, 1, 1))

    def taken(num_frames):
        values = processor.video(iter(frames), num_frames)
        assert values.shape[1:] == (3, 4, 4)
        return values[:, 0, 0, 0].mul(255).round().int().tolist()

    assert taken(None) == list(range(10)) == taken(10)
    assert taken(1) == [5] and taken(2) == [2, 7] and taken(4) == [1, 3, 6, 8]
    for wrong in (0, 11):
        with pytest.raises(ValueError, match=f"{wrong} frames wanted of 10"):
            processor.video(frames, wrong)
    with pytest.raises(ValueError, match="0 frames wanted of 0"):
        processor.video([])


def test_draft_decoding_is_close_and_only_on_request(tmp_path):
    ramp = np.linspace(0, 255, 512, dtype=np.uint8)
    photo = Image.fromarray(np.stack([np.tile(ramp, (512, 1))] * 3, axis=-1))
    photo.save(tmp_path / "photo.jpg", quality=95)
    exact = InternVLImageProcessor(32).squares(tmp_path / "photo.jpg").int()
    fast = InternVLImageProcessor(32, draft=True).squares(tmp_path / "photo.jpg").int()
    assert load_image(tmp_path / "photo.jpg", draft_side=64).size == (64, 64)
    assert load_image(tmp_path / "photo.jpg").size == (512, 512)
    assert (exact - fast).abs().max() <= 4  # a smooth picture: rounding of the two decoders
