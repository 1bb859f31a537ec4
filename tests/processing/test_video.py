"""Frames of videos in all their forms, and decoders by small stand-ins for them."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_chat import picture

from internvl_engine.processing import ImageError, video_frames

FRAMES = [np.full((4, 6, 3), 20 * i, np.uint8) for i in range(12)]


def levels(frames) -> list[int]:
    return [int(np.asarray(frame).flat[0]) // 20 for frame in frames]


def test_lists_arrays_and_tensors():
    stacked = np.stack(FRAMES)
    for video in (FRAMES, tuple(FRAMES), iter(FRAMES), stacked,
                  torch.from_numpy(stacked).permute(0, 3, 1, 2)):  # fmt: skip
        assert levels(video_frames(video)) == list(range(12))
    assert levels(video_frames(stacked, 3)) == [2, 6, 10]
    assert levels(video_frames(FRAMES[:2], 5)) == [0, 1]


def test_folders_are_taken_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 2, 1):
        Image.fromarray(FRAMES[number]).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    (tmp_path / ".hidden.png").write_bytes(b"")
    names = [path.name for path in video_frames(tmp_path)]
    assert names == ["frame1.png", "frame2.png", "frame10.png"]


def test_animations(tmp_path):
    images = [Image.fromarray(frame) for frame in FRAMES]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:])
    assert levels(video_frames(tmp_path / "a.gif", 4)) == [1, 4, 7, 10]


def decoders():
    class Container:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def decode(self, video):
            for frame in FRAMES:
                yield SimpleNamespace(to_ndarray=lambda format, frame=frame: frame)

    class Capture:
        def __init__(self, path):
            self.place = -1

        def grab(self):
            self.place += 1
            return self.place < len(FRAMES)

        def retrieve(self):
            return True, FRAMES[self.place][..., ::-1]

        def release(self):
            pass

    class Reader:
        def __init__(self, path, num_threads):
            pass

        def __len__(self):
            return len(FRAMES)

        def __getitem__(self, place):
            return SimpleNamespace(asnumpy=lambda: FRAMES[place])

    return {"av": {"open": lambda path: Container()}, "cv2": {"VideoCapture": Capture},
            "decord": {"VideoReader": Reader}}  # fmt: skip


@pytest.mark.parametrize("package", ["av", "decord", "cv2"])
def test_video_files_by_what_is_installed(tmp_path, monkeypatch, package):
    for name in ("av", "decord", "cv2"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    module = ModuleType(package)
    vars(module).update(decoders()[package])
    monkeypatch.setitem(sys.modules, package, module)
    path = tmp_path / "a.mp4"
    path.write_bytes(b"film")
    assert levels(video_frames(path)) == [0, 2, 3, 5, 6, 8, 9, 11]
    assert levels(video_frames(str(path), 2)) == [3, 9]
    monkeypatch.setattr(sys.modules[package], next(iter(decoders()[package])), broken)
    with pytest.raises(ImageError, match="a.mp4: not a readable video: no stream"):
        video_frames(path)


def broken(*args, **options):
    raise RuntimeError("no stream")


def test_video_files_without_a_decoder(tmp_path, monkeypatch):
    for name in ("av", "decord", "cv2"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.mp4").write_bytes(b"film")
    with pytest.raises(ImportError, match="a.mp4: .* needs a decoder: pip install av"):
        video_frames(tmp_path / "a.mp4")


@pytest.mark.parametrize("video, error, message", [
    ([], ImageError, "has no frames"),
    (np.zeros((4, 4, 3), np.uint8), ImageError, r"as tensor, .* got \(4, 4, 3\)"),
    (Image.fromarray(picture()), TypeError, "a video must be a list of frames"),
    (b"film", TypeError, "got bytes"), (7, TypeError, "got int"),
    ("gone.mp4", FileNotFoundError, "gone.mp4: no such video"),
])  # fmt: skip
def test_what_is_no_video(video, error, message):
    with pytest.raises(error, match=message):
        video_frames(video)


def test_empty_folders_and_numbers(tmp_path):
    with pytest.raises(ImageError, match="the folder .* has no frames"):
        video_frames(tmp_path)
    with pytest.raises(ValueError, match="num_frames must be a whole number"):
        video_frames(FRAMES, 0)
