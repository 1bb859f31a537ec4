"""The index of a folder: exact, incremental, and whole after a kill at any moment."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from indexed import ROUNDING, assert_holds, everything, fill
from PIL import Image
from tiny_engine import pictures, tiny_engine

from internvl_engine import InternVL
from internvl_engine.index import Entry, FolderIndex, Shards
from internvl_engine.index.search import nearest


@pytest.fixture
def engine():
    return tiny_engine()


@pytest.fixture
def embedded(engine, monkeypatch):
    """How many images were embedded, call by call."""
    counts: list[int] = []
    encode = engine.encode_image

    def count(images, *arguments, **options):
        counts.append(len(images))
        return encode(images, *arguments, **options)

    monkeypatch.setattr(engine, "encode_image", count)
    return counts


@pytest.mark.parametrize("mode", ["c", "g"])
def test_a_folder_is_embedded_and_read_again(engine, tmp_path, mode):
    files = fill(tmp_path / "photos")
    index = engine.index(tmp_path / "photos", mode=mode, batch_size=2, shard_size=3)
    assert (index.report.added, index.report.unchanged, index.report.broken) == (7, 0, {})
    assert_holds(index, engine, files, mode)
    for place in (tmp_path / "photos", tmp_path / "photos" / ".internvl_index"):
        assert_holds(FolderIndex.open(place), engine, files, mode)


@pytest.mark.parametrize("mode", ["c", "g"])
def test_search_is_exact(engine, tmp_path, mode):
    files = fill(tmp_path / "photos", 9)
    index = engine.index(tmp_path / "photos", tmp_path / "out", mode=mode, shard_size=2)
    embeddings = engine.encode_image(list(files.values()), mode)
    text = "a red panda"
    for query, vector in [
        (text, engine.encode_text(text)[0]),
        (files["004.png"], engine.encode_image(files["004.png"], mode)[0]),
        (3 * embeddings[2], embeddings[2]),
    ]:
        scores = embeddings @ vector
        order = scores.argsort(descending=True)[:4]
        hits = engine.search(query, 4)
        assert [hit.name for hit in hits] == [list(files)[i] for i in order]
        assert [hit.path for hit in hits] == [str(files[hit.name]) for hit in hits]
        assert [hit.score for hit in hits] == pytest.approx(scores[order].tolist(), abs=ROUNDING)
    assert engine.search(files["004.png"], 1)[0].name == "004.png"
    assert engine.search(text, 4, index=tmp_path / "out") == index.search(engine, text, 4)
    assert len(engine.search(text, 100)) == 9


@settings(max_examples=10)
@given(
    st.lists(st.lists(st.integers(-2, 2), min_size=3, max_size=3), min_size=1, max_size=30),
    st.integers(1, 8),
    st.integers(1, 10),
)
def test_search_agrees_with_sorting_everything(tmp_path_factory, rows, shard, k):
    """Many equal scores, over shards of any size: the names decide."""
    folder = tmp_path_factory.mktemp("index")
    names = [f"{(7 * i) % len(rows):02}-{i}.png" for i in range(len(rows))]
    with Shards.writing(folder, lambda: {"width": 3}) as shards:
        for start in range(0, len(rows), shard):
            part = slice(start, start + shard)
            entries = [Entry(name, 0, 0, name) for name in names[part]]
            shards.append(entries, torch.tensor(rows[part], dtype=torch.float32))
        shards.append([], torch.empty(0, 3), names[::3])
    hits = nearest(Shards(folder), torch.tensor([1.0, 2, 0]), k)
    left = set(names) - set(names[::3])
    expected = sorted((-(a + 2 * b), name) for (a, b, _), name in zip(rows, names, strict=True))
    assert [(-score, name) for name, score in hits] == [e for e in expected if e[1] in left][:k]


def test_only_what_changed_is_embedded_again(engine, embedded, tmp_path):
    folder = tmp_path / "photos"
    files = fill(folder)
    engine.index(folder)
    embedded.clear()
    again = engine.index(folder)
    assert sum(embedded) == 0 and again.report.unchanged == 7 and again.report.added == 0
    Image.fromarray(pictures(1, seed=9)[0]).save(files["004.png"])  # another picture
    os.utime(files["001.png"])  # the same content at another time
    os.rename(files["002.png"], folder / "moved.png")  # and under another name
    files["below/000.png"].unlink()
    (folder / "new.png").write_bytes(files["005.png"].read_bytes())
    index = engine.index(folder)
    assert sum(embedded) == 1
    assert (index.report.added, index.report.unchanged, index.report.removed) == (4, 3, 2)
    now = {p.relative_to(folder).as_posix(): p for p in sorted(folder.glob("**/*.png"))}
    assert len(now) == 7
    assert_holds(index, engine, now)
    assert_holds(FolderIndex.open(folder), engine, now)


def test_an_old_index_is_compacted(engine, tmp_path):
    folder = tmp_path / "photos"
    files = fill(folder, 6)
    index = engine.index(folder, shard_size=2, batch_size=2)
    assert len(list((folder / ".internvl_index").glob("shard-*"))) == 3
    shard = folder / ".internvl_index" / "shard-000000.safetensors"
    old = shard.read_bytes()
    for name in list(files)[:5]:
        files.pop(name).unlink()
    (folder / "bad.png").write_bytes(b"no image")
    index = engine.index(folder)
    assert len(list((folder / ".internvl_index").glob("shard-*"))) == 1
    assert_holds(index, engine, files)
    reopened = FolderIndex.open(folder)
    assert_holds(reopened, engine, files)
    assert "bad.png" in reopened.shards.entries
    shard.write_bytes(old)  # a kill, or a loss of power, while old shards were deleted
    assert_holds(FolderIndex.open(folder), engine, files)
    assert_holds(engine.index(folder), engine, files)


def test_a_broken_image_is_reported_and_stops_nothing(engine, embedded, tmp_path):
    folder = tmp_path / "photos"
    files = fill(folder)
    good = files["001.png"].read_bytes()
    (folder / "000.jpg").write_bytes(b"not an image")
    (folder / "003.png").unlink(missing_ok=True)
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "nowhere.png").symlink_to(folder / "gone.png")
    (folder / "folder.png").mkdir()
    index = engine.index(folder, batch_size=2)
    assert set(index.report.broken) == {"000.jpg", "cut.png", "empty.png", "nowhere.png"}
    assert "not a readable image" in index.report.broken["000.jpg"]
    assert "No such file" in index.report.broken["nowhere.png"]
    assert index.report.added == 7
    assert_holds(index, engine, files)
    embedded.clear()
    assert set(engine.index(folder).report.broken) == set(index.report.broken)
    assert sum(embedded) == 0
    (folder / "empty.png").write_bytes(good)  # mended
    assert "empty.png" not in engine.index(folder).report.broken


@settings(max_examples=6)
@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6), st.integers(0, 400)
)
def test_damage_of_any_kind_stops_nothing(tmp_path_factory, changes, cut):
    """A real file with bytes changed and its end cut off is embedded or reported."""
    folder = tmp_path_factory.mktemp("damaged")
    Image.fromarray(pictures(1)[0][:10, :10]).save(folder / "a.png")
    content = bytearray((folder / "a.png").read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    (folder / "b.png").write_bytes(content[: len(content) - cut % len(content)])
    index = tiny_engine().index(folder)
    assert "a.png" in everything(index)
    assert ("b.png" in everything(index)) != ("b.png" in index.report.broken)
    assert index.report.broken.get("b.png", "b.png").strip()


def test_which_files_count(engine, tmp_path):
    files = fill(tmp_path)
    for name in ("notes.txt", ".hidden.png", "UPPER.PNG"):
        (tmp_path / name).write_bytes(files["001.png"].read_bytes())
    (tmp_path / ".dots").mkdir()
    (tmp_path / ".dots" / "a.png").write_bytes(b"")
    assert set(everything(engine.index(tmp_path))) == {*files, "UPPER.PNG"}
    flat = engine.index(tmp_path, tmp_path / "flat", recursive=False, extensions={".png"})
    assert set(everything(flat)) == {n for n in files if "/" not in n} | {"UPPER.PNG"}
    seen: list[tuple[int, int]] = []
    engine.index(tmp_path, tmp_path / "third", batch_size=3,
                 progress=lambda *counts: seen.append(counts))  # fmt: skip
    assert seen == [(3, 8), (6, 8), (8, 8)] or seen[-1] == (8, 8)


def test_another_model_is_refused(engine, tmp_path):
    fill(tmp_path, 3)
    engine.index(tmp_path)
    other = tiny_engine(seed=1)
    with pytest.raises(ValueError, match="made by tiny-0, whose weights are not those of tiny-1"):
        other.search("a", index=tmp_path)
    with pytest.raises(ValueError, match="use that model, or index the folder again"):
        other.index(tmp_path)
    with pytest.raises(ValueError, match="holds embeddings of mode 'c', not 'g'"):
        engine.index(tmp_path, mode="g")


def test_a_text_tower_may_search_what_a_vision_tower_indexed(engine, tmp_path, monkeypatch):
    """Where no part is common, the name of the model must be the same."""
    fill(tmp_path, 3)
    prints = dict(engine.fingerprint)
    monkeypatch.setattr(InternVL, "fingerprint", {"vision": prints["vision"]})
    engine.index(tmp_path)
    monkeypatch.setattr(InternVL, "fingerprint", {"text": prints["text"]})
    assert len(engine.search("a", index=tmp_path)) == 3
    monkeypatch.setattr(engine, "name", "another")
    with pytest.raises(ValueError, match="not those of another"):
        engine.search("a", index=tmp_path)


def test_damage_and_absence_are_said(engine, tmp_path):
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        engine.index(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no index in"):
        engine.search("a", index=tmp_path)
    fill(tmp_path, 3)
    index = engine.index(tmp_path)
    with pytest.raises(ValueError, match="k must be 1 or more"):
        engine.search("a", 0)
    with pytest.raises(ValueError, match="one text, one image"):
        engine.search(pictures(2))
    (shard,) = index.shards.folder.glob("shard-*")
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
        FolderIndex.open(tmp_path)
    (index.shards.folder / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="index.json is damaged"):
        FolderIndex.open(tmp_path)


def test_two_writers_do_not_mix(engine, tmp_path):
    fill(tmp_path, 3)
    index = engine.index(tmp_path)
    with (
        Shards.writing(index.shards.folder, dict),
        pytest.raises(BlockingIOError, match="another process is writing"),
    ):
        engine.index(tmp_path)


def test_an_empty_folder_is_an_empty_index(engine, tmp_path):
    index = engine.index(tmp_path)
    assert len(index) == 0 and engine.search("a") == []


def test_names_that_are_no_unicode(engine, tmp_path):
    source = fill(tmp_path / "source", 2)["001.png"]
    folder = tmp_path / "photos"
    folder.mkdir()
    name = os.fsdecode(b"caf\xe9 \xff.png")
    (folder / name).write_bytes(source.read_bytes())
    engine.index(folder)
    assert [hit.name for hit in engine.search("a", index=folder)] == [name]


class Killed(BaseException):
    """What SIGKILL is to a process: from then on nothing is written."""


class Disk:
    """Kills the run before or after one of its fsyncs and renames; says which there were."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.left, self.dead = 0, False
        for place, name in [(os, "fsync"), (os, "replace"), (os, "unlink"), (Path, "unlink")]:
            patch.setattr(place, name, self.wrap(getattr(place, name)))

    def wrap(self, function):
        def run(*arguments):
            self.step()
            result = function(*arguments)
            self.step()
            return result

        return run

    def step(self) -> None:
        self.left -= 1
        self.dead = self.dead or self.left == 0
        if self.dead:
            raise Killed

    def kill_at(self, step: int) -> None:
        self.left, self.dead = step, False


def test_killed_at_any_write_it_goes_on_from_there(engine, tmp_path, monkeypatch):
    """Before and after every fsync, rename and deletion, one later in every run."""
    files = fill(tmp_path / "photos", 16)
    folder, kept, disk = tmp_path / "photos", [], Disk(monkeypatch)
    monkeypatch.setattr("internvl_engine.index.shards.MANY_SHARDS", 3)  # compacts in the end
    for step in range(1, 60):
        disk.kill_at(step)
        try:
            engine.index(folder, batch_size=2, shard_size=2)
            break
        except Killed:
            disk.kill_at(-1)
        try:
            kept.append(len(FolderIndex.open(folder)))
        except FileNotFoundError:
            kept.append(None)
    assert None in kept and len(kept) >= 10  # killed before there was an index, and often later
    counts = [count for count in kept if count is not None]
    assert counts == sorted(counts)  # nothing that was written is lost
    assert any(0 < count < 16 for count in counts)
    index = FolderIndex.open(folder)
    assert_holds(index, engine, files)
    assert len(index.shards.shards) == 1
    assert not list((tmp_path / "photos").rglob("*.tmp"))
