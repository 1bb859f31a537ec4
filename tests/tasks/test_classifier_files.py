"""Classifiers on disk: found again, never believed where something is amiss, bounded, shared."""

import copy
import multiprocessing
import os
import stat
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_engine import tiny_engine
from torch import nn

from internvl_engine import kernels
from internvl_engine.tasks import classifier as module
from internvl_engine.tasks import classifier_files
from internvl_engine.tasks.classifier import classifier
from internvl_engine.tasks.classifier_files import ClassifierFiles, user_folder
from internvl_engine.weights import Int8Tensor

LABELS = ["cat", "dog", "red panda"]
KEY, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def runs(monkeypatch):
    """Engines that remember nothing of each other; counts the lists of prompts that they embed."""
    monkeypatch.setattr(module, "SLOW", 0.0)
    calls = []

    def engine(seed=0):
        made = copy.copy(tiny_engine(seed))
        made.remembered = {}
        encode = made.encode_text
        monkeypatch.setattr(made, "encode_text", lambda texts: calls.append(texts) or encode(texts))
        return made

    return engine, calls


def test_another_process_finds_the_weights(runs, tmp_path):
    engine, calls = runs
    first = classifier(engine(), LABELS, cache=tmp_path / "new" / "folder")
    (path,) = (tmp_path / "new" / "folder").iterdir()
    assert path.suffix == ".safetensors" and len(calls) == 1
    again = classifier(engine(), tuple(LABELS), "a photo of a {}.", cache=tmp_path / "new/folder")
    assert torch.equal(again, first) and len(calls) == 1
    again.add_(1)  # nobody else's memory
    assert torch.equal(classifier(engine(), LABELS, cache=path.parent), first)


def test_what_the_weights_depend_on_is_in_the_key(runs, tmp_path, monkeypatch):
    engine, calls = runs

    def is_new(made, *args, **options):
        before = len(calls)
        classifier(made, *args, cache=tmp_path, **options)
        return len(calls) > before

    assert is_new(engine(), LABELS) and not is_new(engine(), LABELS)
    assert is_new(engine(1), LABELS)
    assert is_new(engine(), LABELS[::-1]) and is_new(engine(), ["cat", "dogred", " panda"])
    assert is_new(engine(), LABELS, ["{}"]) and is_new(engine(), LABELS, ["{}", "a {}"])
    assert is_new(engine(), LABELS, lambda name: f"the {name}")
    assert not is_new(engine(), LABELS, lambda name: "the " + name)
    assert is_new(engine(), LABELS, lambda name: f"one {name}")
    with kernels.batch_invariant():
        assert is_new(engine(), LABELS)
    changed = engine()
    changed.model = copy.deepcopy(changed.model)
    changed.model.text_projection.data.mul_(2)
    assert is_new(changed, LABELS)
    changed.model.to(torch.bfloat16)
    assert is_new(changed, LABELS)
    words = engine()
    words.processor = copy.copy(words.processor)
    words.processor.tokenizer = copy.copy(words.processor.tokenizer)
    words.processor.tokenizer._pieces = tiny_engine().processor.tokenizer._pieces
    words.processor.tokenizer.model_bytes += b"\0"
    assert is_new(words, LABELS)
    assert not is_new(engine(), LABELS)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign", "renamed", "a folder"])
def test_a_file_that_is_amiss_is_written_anew(runs, tmp_path, damage):
    engine, calls = runs
    expected = classifier(engine(), LABELS, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    if damage == "renamed":
        classifier(engine(1), LABELS, cache=tmp_path)
        (other,) = set(tmp_path.iterdir()) - {path}
        other.replace(path)
    elif damage == "a folder":
        path.unlink()
        path.mkdir()
    else:
        flipped = content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]
        path.write_bytes({"cut": content[:-9], "flipped": flipped, "empty": b"",
                          "foreign": b"\x80\x02}q\x00."}[damage])  # fmt: skip
    calls.clear()
    if damage == "a folder":  # cannot be put right: said, and done without
        with pytest.warns(UserWarning, match="classifiers are not kept in"):
            assert torch.equal(classifier(engine(), LABELS, cache=tmp_path), expected)
        return
    assert torch.equal(classifier(engine(), LABELS, cache=tmp_path), expected)
    assert len(calls) == 1 and path.read_bytes() == content


def test_files_stay_within_the_limit(tmp_path):
    files, weights = ClassifierFiles(tmp_path, limit=10_000), torch.randn(10, 90)
    (tmp_path / "notes.txt").write_bytes(b"x" * 50_000)  # nobody's business
    keys = [f"{number:064x}" for number in range(5)]
    for number, key in enumerate(keys):
        files.write(key, weights)
        os.utime(tmp_path / f"{key}.safetensors", (number, number))
        assert files.read(keys[0], (10, 90)) is not None  # in use
    left = {path.name for path in tmp_path.iterdir()} - {"notes.txt"}
    assert left == {f"{keys[0]}.safetensors", f"{keys[4]}.safetensors"}
    files.write(OTHER, torch.randn(100, 90))  # alone larger than all may be
    assert files.read(OTHER, (100, 90)) is None and files.read(keys[4], (10, 90)) is not None
    old, young = tmp_path / "classifier-old.tmp", tmp_path / "classifier-young.tmp"
    for path in (old, young):
        path.write_bytes(b"unfinished")
    os.utime(old, (1, 1))
    files.write(KEY, weights)
    assert not old.exists() and young.exists() and (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8"])
def test_one_changed_row_of_the_embeddings_is_in_the_key(form):
    """`fingerprint` reads samples of a table as large as this."""
    torch.manual_seed(0)
    values = torch.randn(3000, 64)

    def key(values):
        weight = Int8Tensor.quantize(values) if form == "int8" else values.to(getattr(torch, form))
        table = SimpleNamespace(weight=nn.Parameter(weight, False))
        model = SimpleNamespace(get_input_embeddings=lambda: table)
        return module._of_every_row(KEY, SimpleNamespace(model=model))

    changed = values.clone()
    changed[1234, 5] += 1
    assert key(values) == key(values.clone()) != key(changed)


def test_a_shape_that_is_not_asked_for_is_none(tmp_path):
    files = ClassifierFiles(tmp_path)
    files.write(KEY, torch.randn(3, 4))
    assert files.read(KEY, (3, 4)) is not None
    assert files.read(KEY, (4, 3)) is None and files.read(OTHER, (3, 4)) is None


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.warns(UserWarning, match="INTERNVL_CLASSIFIERS"):
        ClassifierFiles(tmp_path / "new").write(KEY, torch.ones(1, 1))


def test_no_folder_can_be_made_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="INTERNVL_CLASSIFIERS"):
        ClassifierFiles(tmp_path / "file" / "new").write(KEY, torch.ones(1, 1))
    assert ClassifierFiles(tmp_path / "file" / "new").read(KEY, (1, 1)) is None


def churn(folder: str, seed: int) -> int:
    """Writes and reads few keys in little room; how often a read gave something wrong."""
    files, wrong = ClassifierFiles(folder, limit=30_000), 0
    for turn in range(40):
        key = f"{(turn + seed) % 7:064x}"
        weights = torch.full((20, 50), float(int(key, 16)))
        files.write(key, weights)
        found = files.read(key, (20, 50))
        wrong += found is not None and not torch.equal(found, weights)
    return wrong


def test_threads_and_processes_share_a_folder(tmp_path):
    wrong = []
    threads = [
        threading.Thread(target=lambda seed=seed: wrong.append(churn(str(tmp_path), seed)))
        for seed in range(3)
    ]
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    process = context.Process(target=churn, args=(str(tmp_path), 5))
    process.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    process.join()
    assert wrong == [0, 0, 0] and process.exitcode == 0
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 60_000
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "platform, variables, expected",
    [
        ("linux", {}, "/users/me/.cache/internvl_engine/classifiers"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/internvl_engine/classifiers"),
        ("darwin", {}, "/users/me/Library/Caches/internvl_engine/classifiers"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/internvl_engine/classifiers"),
        ("linux", {"INTERNVL_CACHE": "/ours"}, "/ours/classifiers"),
        ("linux", {"INTERNVL_CACHE": "/ours", "INTERNVL_CLASSIFIERS": "/here"}, "/here"),
        ("linux", {"INTERNVL_CLASSIFIERS": "off"}, None),
        ("linux", {"INTERNVL_CLASSIFIERS": "0"}, None),
    ],
)
def test_the_place_follows_the_platform(platform, variables, expected, monkeypatch):
    for name in ("INTERNVL_CACHE", "INTERNVL_CLASSIFIERS", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(classifier_files.sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("/users/me"))
    assert user_folder() == (None if expected is None else Path(expected))
    found = ClassifierFiles.at(True)
    assert found is None if expected is None else found.folder == Path(expected)
    assert ClassifierFiles.at(False) is None and ClassifierFiles.at("/a").folder == Path("/a")


def test_what_is_made_fast_is_not_written(monkeypatch, tmp_path):
    engine = copy.copy(tiny_engine())
    engine.remembered = {}
    monkeypatch.setenv("INTERNVL_CLASSIFIERS", str(tmp_path))
    monkeypatch.setattr(module, "SLOW", 1e9)
    classifier(engine, LABELS)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(module, "SLOW", 0.0)
    classifier(engine, LABELS[:2])
    assert len(list(tmp_path.iterdir())) == 1
    engine.classify([], LABELS[:1], cache=False)
    assert len(list(tmp_path.iterdir())) == 1
    engine.classify([], LABELS[:1], cache=tmp_path / "mine")
    assert not (tmp_path / "mine").exists()  # remembered by now
    list(engine.classify_each([], LABELS[1:], cache=tmp_path / "mine"))
    assert len(list((tmp_path / "mine").iterdir())) == 1
