"""`internvl demo`: offline, quick, right, and a picture that shows it; and the examples."""

import contextlib
import io
import json
import runpy
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from internvl_engine.assets import nano_directory
from internvl_engine.cli import main, sheet
from internvl_engine.cli.demo import Demo, Picture, Scene, _accuracy, _more

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A run as a user's, from an empty folder, without network: (document, picture, seconds)."""
    folder = tmp_path_factory.mktemp("demo")
    printed = io.StringIO()
    before = time.process_time()  # others may be busy
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        for name in ("socket.connect", "getaddrinfo"):
            patch.setattr(f"socket.{name}", None)  # whoever asks for the network fails
        with pytest.raises(SystemExit) as exit:
            main(["demo", "--json"])
    assert not exit.value.code
    seconds = time.process_time() - before
    return json.loads(printed.getvalue()), folder / "internvl_demo.png", seconds


def test_the_embedded_model_is_right(shown):
    document, _, _ = shown
    accuracy = document["accuracy"]
    assert set(accuracy) == {"zero_shot_c", "zero_shot_g", "caption", "retrieval_r1", "chat"}
    assert all(0.98 <= accuracy[n] <= 1 for n in ("zero_shot_c", "zero_shot_g", "caption")), (
        accuracy
    )
    assert accuracy["retrieval_r1"] >= 0.9
    assert accuracy["chat"] >= 0.9 and document["more"]["chat_later"] >= 0.95
    assert document["counts"]["images"] == 360 and document["counts"]["labels"] == 10
    assert document["counts"]["parameters"] > 100_000
    assert {"device", "dtype", "torch", "transformers"} <= set(document["machine"])
    assert document["seconds"]["all"] > 0


def test_it_takes_seconds(shown):
    assert shown[2] < 15  # on one core; a machine at rest needs about half


def test_the_picture_is_a_page(shown):
    with Image.open(shown[1]) as page:
        assert page.size[0] == 1600 and page.size[1] > 1000
        colours = page.convert("RGB").getcolors(1 << 24)
    assert len(colours) > 5000  # pictures and smooth letters, not an empty page
    most = max(colours)[1]
    assert "#{:02x}{:02x}{:02x}".format(*most) == sheet.DARK.page


def picture(colour: str, digit: str, caption: str = "", label: str = "") -> Picture:
    return Picture(
        Image.new("RGB", (56, 56), (20, 22, 32)), colour, digit,
        caption=caption or f"a {colour} {digit}",
        answers={"colour": colour, "digit": label or digit},
        label={"c": label or digit, "g": digit}, probability={"c": 0.75, "g": 0.5},
    )  # fmt: skip


def by_hand() -> Demo:
    """Four right pictures among twenty, each kind of mistake in its own number."""
    right = [picture("red", "one"), picture("blue", "two")] * 8
    wrong = [picture("red", "one", "a red seven")] * 3 + [picture("red", "one", label="two")]
    pictures = right + wrong
    pair, truths = Image.new("RGB", (112, 56), (20, 22, 32)), ("a red one and a blue two", "red")
    scenes = [Scene(pair, truths, truths)] * 3 + [Scene(pair, truths, ("a red one", "red"))]
    searches = {"a red one": [(0, 0.9), (1, 0.2)] * 4, "a blue two": [(0, 0.8), (1, 0.7)] * 4}
    return Demo(
        pictures, scenes, searches, _accuracy(pictures, scenes, searches),
        _more(pictures, scenes), {"all": 1.0},
        {"device": "a machine", "torch": "2", "dtype": "float32"}, 1000,
    )  # fmt: skip


def test_shares_are_counted():
    demo = by_hand()
    assert demo.accuracy == {
        "zero_shot_c": 19 / 20, "zero_shot_g": 1.0, "caption": 17 / 20, "retrieval_r1": 1 / 2,
        "chat": 3 / 4,
    }  # fmt: skip
    assert demo.more == {"answer_colour": 1.0, "answer_digit": 19 / 20, "chat_later": 1.0}


@pytest.mark.parametrize("light, palette", [(False, sheet.DARK), (True, sheet.LIGHT)])
def test_mistakes_are_marked(light, palette):
    demo = by_hand()
    demo.searches["a red one"] = [(0, 0.9)] * 8
    page = sheet.draw(demo, light)
    counts = {colour: count for count, colour in page.getcolors(1 << 24)}
    for name in (palette.page, palette.text, palette.inks["red"]):
        assert tuple(bytes.fromhex(name[1:])) in counts, name
    outline = 4 * sheet.TILE  # pixels, at the least, around each of four wrong pictures and a scene
    assert counts[tuple(bytes.fromhex(palette.wrong[1:]))] > 4 * outline


@pytest.fixture
def example(monkeypatch, capsys):
    def run(name: str, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


SAMPLES = sorted(nano_directory().glob("samples/*.png"))


def test_example_describe(example):
    colour, digit = SAMPLES[0].stem.split("-")
    assert example("describe.py") == [
        f"a {colour} {digit}", f"what digit is it? {digit}", f"what colour is it? {colour}"
    ]  # fmt: skip


def test_example_converse(example):
    assert example("converse.py") == ["What digits? seven", "What colour is it? red"]


def test_example_zero_shot(example):
    lines = example("zero_shot.py")
    assert len(lines) == 2 * len(SAMPLES)
    for line, path in zip(lines, SAMPLES * 2, strict=True):
        assert line[3:].startswith(f"{path}: {path.stem.split('-')[1]} ")


def test_example_search_folder(example):
    lines = example("search_folder.py")
    assert lines[0] == f"{len(SAMPLES)} of {len(SAMPLES)}"
    assert lines[2].split()[1].startswith("blue-")
    assert lines[5].startswith("like blue-")
