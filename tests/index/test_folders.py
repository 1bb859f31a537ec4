"""An index and its folder over time: what is kept, dropped, refused, tried again."""

import builtins
import copy
import os
import pickle
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from indexed import assert_holds, fill
from PIL import Image
from tiny_engine import pictures, tiny_engine

from internvl_engine import InternVL
from internvl_engine.index import Entry, FolderIndex, Shards
from internvl_engine.index.search import nearest


@pytest.fixture
def engine():
    return tiny_engine()


@pytest.fixture
def photos(tmp_path):
    fill(tmp_path / "photos")
    return tmp_path / "photos"


def quietly(call, *arguments, **options):
    """A run that must not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call(*arguments, **options)


def test_an_index_holds_one_folder(engine, photos, tmp_path):
    fill(tmp_path / "others", 3, seed=1)
    index = engine.index(photos, tmp_path / "out")
    with pytest.raises(ValueError, match="holds the images of .*photos, not of .*others"):
        engine.index(tmp_path / "others", tmp_path / "out")
    with pytest.raises(ValueError, match="not of .*below"):
        engine.index(photos / "below", tmp_path / "out")
    assert len(FolderIndex.open(tmp_path / "out")) == len(index) == 7
    (tmp_path / "link").symlink_to(photos)
    assert engine.index(tmp_path / "link", tmp_path / "out").report.unchanged == 7


@pytest.mark.parametrize("inside", [True, False])
def test_hits_can_be_opened(engine, photos, tmp_path, monkeypatch, inside):
    """Whatever the working directory is, and from an index that moved with its folder."""
    monkeypatch.chdir(tmp_path)
    engine.index("photos", None if inside else "out")
    place = "photos" if inside else "out"
    opened = FolderIndex.open(place)
    monkeypatch.chdir("/")
    for hit in [*opened.search(engine, "a"), *engine.search("a", index=tmp_path / place)]:
        assert Path(hit.path) == photos / hit.name and Path(hit.path).is_file()
    if inside:
        photos.rename(tmp_path / "moved")
        for hit in engine.search("a", index=tmp_path / "moved"):
            assert Path(hit.path) == tmp_path / "moved" / hit.name
        assert engine.index(tmp_path / "moved").report.unchanged == 7


def test_weights_that_changed_are_refused(photos):
    engine = copy.deepcopy(tiny_engine())
    engine.index(photos)
    before = {path: path.read_bytes() for path in (photos / ".internvl_index").glob("*.s*")}
    engine.model.clip_projector.cross_attn.q_bias.data.add_(1)
    for call in (lambda: engine.index(photos), lambda: engine.search("a")):
        with pytest.raises(ValueError, match="not those of tiny-0, which have changed since"):
            call()
    assert before == {path: path.read_bytes() for path in before}
    engine.model.load_state_dict(tiny_engine().model.state_dict())
    assert engine.index(photos).report.unchanged == 7


def test_pictures_of_another_form_are_refused(engine, photos):
    index = engine.index(photos)
    processor = copy.copy(engine.processor)
    processor.image_processor = copy.copy(processor.image_processor)
    processor.image_processor.geometry = "classification"
    other = InternVL(engine.model, processor, name=engine.name, accelerate=False)
    with pytest.raises(ValueError, match="made of pictures with geometry retrieval"):
        other.index(photos)
    assert other.search("a", index=photos) == index.search(engine, "a")


def test_a_folder_that_is_gone_is_forgotten(engine, photos):
    for path in (photos / "below").iterdir():
        path.unlink()
    (photos / "below").rmdir()
    (photos / "001.png").unlink()
    fresh = {p.name: p for p in sorted(photos.glob("*.png"))}
    fill(photos)
    engine.index(photos)
    for path in [*(photos / "below").iterdir(), photos / "001.png"]:
        path.unlink()
    (photos / "below").rmdir()
    index = quietly(engine.index, photos)
    assert index.report.removed == 4 and index.report.kept == {}
    assert_holds(index, engine, fresh)


@pytest.mark.parametrize("place", ["below", "."])
def test_a_disk_that_is_not_mounted_costs_nothing(engine, photos, tmp_path, place):
    """Its place is an empty folder."""
    engine.index(photos, tmp_path / "out")
    (photos / place).resolve().rename(tmp_path / "away")
    (photos / place).mkdir()
    with pytest.warns(UserWarning, match="it is empty, as a disk that is not mounted"):
        index = engine.index(photos, tmp_path / "out")
    assert index.report.removed == 0 and list(index.report.kept) == [place]
    assert len(FolderIndex.open(tmp_path / "out")) == 7
    (photos / place).rmdir()
    (tmp_path / "away").rename((photos / place).resolve())
    assert quietly(engine.index, photos, tmp_path / "out").report.unchanged == 7


def test_a_folder_that_cannot_be_listed_is_kept(engine, photos, monkeypatch):
    engine.index(photos)
    (photos / "001.png").unlink()
    listed = os.scandir

    def scandir(path="."):
        if Path(path).name == "below":
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.warns(UserWarning, match=r"below of .*photos cannot be looked at \(Permission"):
        index = engine.index(photos)
    assert index.report.removed == 1 and index.report.kept == {"below": "Permission denied"}
    assert len(index) == 6


def test_a_file_that_cannot_be_read_keeps_its_embedding(engine, photos, monkeypatch):
    files = {p.relative_to(photos).as_posix(): p for p in sorted(photos.rglob("*.png"))}
    engine.index(photos)
    for name in ("001.png", "002.png"):
        os.utime(files[name])
    Image.fromarray(pictures(1, seed=9)[0]).save(photos / "new.png")
    opened = builtins.open

    def failing(path, *arguments, **options):
        if Path(path).name in ("001.png", "new.png"):
            raise OSError(5, "Input/output error", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(builtins, "open", failing)
    with pytest.warns(UserWarning, match="001.png of .*Input/output error"):
        index = engine.index(photos)
    assert list(index.report.kept) == ["001.png"] and list(index.report.broken) == ["new.png"]
    assert index.report.added == 1  # 002.png
    monkeypatch.undo()
    assert_holds(index, engine, files)
    index = quietly(engine.index, photos)
    assert index.report.broken == {} and index.report.added == 2
    assert_holds(index, engine, {**files, "new.png": photos / "new.png"})


def test_what_was_broken_is_tried_again(engine, photos):
    processor = engine.processor.image_processor
    processor.max_pixels = 100
    try:
        broken = engine.index(photos).report.broken
        assert len(broken) == 7 and all("more than 100" in why for why in broken.values())
        again = engine.index(photos)
        assert again.report.unchanged == 7
        shards = again.shards.folder.glob("shard-*")
        assert len(list(shards)) == 1  # what is known is not written again
    finally:
        processor.max_pixels = type(processor)().max_pixels
    index = engine.index(photos)
    assert index.report.broken == {} and index.report.added == 7


def test_what_is_no_picture_stops_nothing(engine, photos):
    """Named pipes, devices and files larger than memory are one line each, in time."""
    os.mkfifo(photos / "pipe.jpg")
    (photos / "zero.jpg").symlink_to("/dev/zero")
    with open(photos / "sparse.png", "wb") as file:
        file.truncate(200 * 2**30)
    (photos / "notes.txt").write_text("a")
    (photos / "more.TXT").write_text("a")
    index = engine.index(photos)
    reasons = index.report.broken
    assert set(reasons) == {"pipe.jpg", "zero.jpg", "sparse.png"}
    assert "not a regular file" in reasons["pipe.jpg"] and "not a regular" in reasons["zero.jpg"]
    assert "more than any picture" in reasons["sparse.png"]
    assert index.report.added == 7 and index.report.skipped == {".txt": 2}


def test_endings(engine, tmp_path):
    file = pictures(1)[0]
    for name in ("a.jfif", "b.jpe", "c.apng", "d.PNG", "e.heic", "f.xyz"):
        kind = {"a": "JPEG", "b": "JPEG"}.get(name[0], "PNG")
        Image.fromarray(file).save(tmp_path / name, kind)
    index = engine.index(tmp_path)
    assert len(index) == 5 and index.report.skipped == {".xyz": 1}  # by its content, heic too
    for extensions in (["xyz"], {".XYZ"}, "xyz"):
        place = tmp_path / "out" / str(type(extensions))
        assert len(engine.index(tmp_path, place, extensions=extensions)) == 1
    again = quietly(engine.index, tmp_path, extensions=["png"])
    assert again.report.removed == 0 and len(again) == 5  # others are not gone


@pytest.fixture
def nan(engine, monkeypatch):
    """Switches NaN on for white pictures, or for all."""
    vision, state = engine.model.vision_model.forward, {"all": False}

    def forward(pixel_values, **options):
        output = vision(pixel_values=pixel_values, **options)
        bad = (pixel_values > 2).flatten(1).all(1) | state["all"]
        output.last_hidden_state = torch.where(bad[:, None, None], torch.nan, output[0])
        return output

    monkeypatch.setattr(engine.model.vision_model, "forward", forward)
    return state


def test_one_picture_without_an_embedding_is_broken(engine, nan, photos):
    Image.new("RGB", (20, 20), "white").save(photos / "white.png")
    index = engine.index(photos)
    assert list(index.report.broken) == ["white.png"] and len(index) == 7
    assert "not finite" in index.report.broken["white.png"]
    (photos / "only").mkdir()
    Image.new("RGB", (20, 20), "white").save(photos / "only" / "white.png")
    assert list(engine.index(photos / "only").report.broken) == ["white.png"]


def test_a_model_without_embeddings_is_an_error(engine, nan, photos):
    nan["all"] = True
    with pytest.raises(ValueError, match="tiny-0 embeds nothing, not even a grey square"):
        engine.index(photos)
    assert len(FolderIndex.open(photos)) == 0


def test_a_reader_meets_a_writer_that_compacts(engine, photos, monkeypatch):
    """Shards that vanish between listing and reading: what replaced them is read."""
    index = engine.index(photos, shard_size=2, batch_size=2)
    monkeypatch.setattr("internvl_engine.index.shards.MANY_SHARDS", 1)
    listed, compacted = Shards._numbers, []

    def numbers(self):
        found = listed(self)
        if not compacted:
            compacted.append(True)
            with Shards.writing(index.shards.folder, dict) as shards:
                shards.compact()
        return found

    monkeypatch.setattr(Shards, "_numbers", numbers)
    reader = FolderIndex.open(photos)
    assert compacted and len(reader.shards.shards) == 1 and len(reader) == 7
    found = [hit.name for hit in reader.search(engine, "a")]
    assert [hit.name for hit in index.search(engine, "a")] == found  # the old files are mapped


def test_several_make_a_first_index_at_once(photos):
    """One does; the others are told."""
    results: list[object] = []
    barrier = threading.Barrier(4)

    def make():
        engine = copy.copy(tiny_engine())
        barrier.wait()
        try:
            results.append(len(engine.index(photos)))
        except Exception as error:  # noqa: BLE001
            results.append(error)

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 7 in results
    for result in results:
        assert result == 7 or "another process is writing" in str(result)
    assert len(FolderIndex.open(photos)) == 7


def test_where_nothing_can_be_written_is_said(engine, photos, monkeypatch):
    def mkdir(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(PermissionError, match="cannot be written .*give another output folder"):
        engine.index(photos)


def test_queries_in_every_form(engine, photos):
    index = engine.index(photos)
    vector = engine.encode_text("a red panda")
    expected = engine.search("a red panda", 3)
    forms = [vector[0], vector, vector.numpy()[0], 5 * vector.double().numpy(), vector[0].tolist()]
    for form in forms:
        found = engine.search(form, 3)
        assert [hit.name for hit in found] == [hit.name for hit in expected]
        assert [h.score for h in found] == pytest.approx([h.score for h in expected], abs=1e-6)
    for wrong in (np.zeros(48), np.full(48, np.nan)):
        with pytest.raises(ValueError, match="finite values, not all of them 0"):
            engine.search(wrong)
    with pytest.raises(ValueError, match=r"an embedding \(48,\), got \(1, 47\)"):
        engine.search(np.ones(47))
    assert repr(index) == (
        f"FolderIndex(7 images of {photos}, mode 'c', made by tiny-0, in {index.shards.folder})"
    )
    assert str(index.report).startswith("7 added, 0 unchanged, 0 removed, 0 broken (")
    received = pickle.loads(pickle.dumps(index))
    assert received.search(engine, "a") == index.search(engine, "a")


def test_rows_are_mapped_not_read(tmp_path):
    """An index may be larger than memory: opening, searching and compacting copy none of it."""
    width, count = 16_384, 2000  # 131 MB
    with Shards.writing(tmp_path, lambda: {"width": width}) as shards:
        for first in range(0, count, count // 2):
            rows = torch.zeros(count // 2, width)
            rows[:, 0] = torch.arange(first, first + count // 2)
            names = [f"{first + i}" for i in range(count // 2)]
            shards.append([Entry(name, 0, 0, name) for name in names], rows)
        del rows
        before = anonymous()
        shards.reload()
        found = nearest(shards, torch.eye(1, width)[0], 2)
        shards._place.clear()  # as if much was dead
        shards.compact()
        grown = anonymous() - before
    assert found == [(f"{count - 1}", count - 1.0), (f"{count - 2}", count - 2.0)]
    assert len(shards.shards) == 1 and len(shards.entries) == count
    assert grown < 45e6  # pieces in passing, and what malloc keeps


def anonymous() -> int:
    """Bytes of memory of this process that are no pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
