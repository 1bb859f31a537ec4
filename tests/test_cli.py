"""The command line: what comes out, on which stream, with which exit code."""

import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from chat_folders import folder_of
from PIL import Image
from tiny_engine import pictures, saved, tiny_engine

from internvl_engine.cli import main

ROOT = Path(__file__).parents[1]
COMMANDS = "demo classify caption ask embed chat index search doctor verify convert bench".split()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> str:
    return saved(tmp_path_factory)


@pytest.fixture
def photos(tmp_path) -> list[str]:
    paths = [tmp_path / "photos" / f"{name}.png" for name in "abcde"]
    paths[0].parent.mkdir()
    for path, picture in zip(paths, pictures(5), strict=True):
        Image.fromarray(picture).save(path)
    return [str(path) for path in paths]


@pytest.fixture
def run(capsys, monkeypatch, checkpoint):
    """Runs a command in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("INTERNVL_MODEL", checkpoint)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return exit.value.code or 0, out, err

    return call


@pytest.fixture
def engine(checkpoint):
    from internvl_engine import InternVL

    return InternVL.from_pretrained(checkpoint)


def from_json(result: tuple[int, str, str]) -> dict:
    code, out, err = result
    assert (code, err) == (0, "")  # no bar in a pipe
    return json.loads(out)


@pytest.mark.parametrize("name", COMMANDS[:-1])
def test_every_command_has_help_json_and_debug(run, name):
    code, out, _ = run(name, "--help")
    assert code == 0 and "--json" in out and "--debug" in out


def test_version(run):
    from internvl_engine import __version__

    assert run("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize("mode", ["c", "g"])
def test_classify(run, photos, engine, mode):
    options = ("--labels", "cat,dog", "--labels", "red panda", "--mode", mode)
    found = from_json(run("classify", *photos, *options, "--top", 2, "--json"))
    expected = engine.classify(photos, ["cat", "dog", "red panda"], mode=mode, top_k=2)
    assert found["mode"] == mode and [r["image"] for r in found["results"]] == photos
    for row, predictions in zip(found["results"], expected, strict=True):
        assert [p["label"] for p in row["predictions"]] == [p.label for p in predictions]
        assert row["predictions"][0]["probability"] == pytest.approx(
            predictions[0].probability, abs=1e-4
        )
    code, out, err = run("classify", photos[0], *options)
    assert (code, err) == (0, "") and out.splitlines()[0] == photos[0]
    assert out.splitlines()[1].split("%")[1].strip() == expected[0][0].label


def test_labels_of_a_file_keep_their_places(run, photos, engine, tmp_path):
    """Published class lists have empty and equal lines, and their numbers are the classes."""
    (tmp_path / "labels.txt").write_bytes("cat\n\nred panda, small\ncat\n".encode("utf-8-sig"))
    labels = ["cat", "", "red panda, small", "cat"]
    options = ("-l", f"@{tmp_path / 'labels.txt'}", "--template", "{} it is")
    found = from_json(run("classify", photos[0], *options, "--json"))
    expected = engine.classify(photos[0], labels, templates=["{} it is"])[0]
    rows = found["results"][0]["predictions"]
    assert [row["label"] for row in rows] == [row.label for row in expected]
    assert sorted(row["label"] for row in rows) == sorted(labels)
    assert rows[0]["probability"] == pytest.approx(expected[0].probability, abs=1e-4)


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("command", ["classify", "caption", "embed"])
def test_one_bad_picture_costs_no_result(run, photos, tmp_path, command, as_json):
    bad = str(tmp_path / "bad\x1b[2J.jpg")
    Path(bad).write_text("no image")
    names = [photos[0], bad, photos[1], "nothing.jpg", photos[2]]
    options = {"classify": ["-l", "a,b"], "caption": ["--max-new-tokens", 2], "embed": []}[command]
    options += ["--batch-size", 2]
    code, out, err = run(command, *names, *options, *["--json"] * as_json)
    assert code == 1
    lines = err.splitlines()
    assert len(lines) == 2 and r"bad\x1b[2J.jpg: not a readable image: " in lines[0]
    assert lines[1] == "internvl: nothing.jpg: no such image file"
    good = [photos[0], photos[1], photos[2]]
    if not as_json:
        assert [name for name in names if name in out] == good and "\x1b" not in out
        return
    document = json.loads(out)
    assert document["error"] == "2 of 5 images could not be used"
    if command == "embed":
        alone = from_json(run("embed", *good, "--json"))
        assert document["images"] == good
        torch.testing.assert_close(
            torch.tensor(document["embeddings"]["c"]), torch.tensor(alone["embeddings"]["c"])
        )
    else:
        assert [row["image"] for row in document["results"]] == names
        assert ["error" in row for row in document["results"]] == [0, 1, 0, 1, 0]


def test_results_come_one_after_another(run, photos, engine, monkeypatch):
    """What is known is printed before the next batch is computed."""
    from internvl_engine import InternVL

    shown = []

    def caption_each(self, images, prompts, **options):
        for number in range(len(images)):
            shown.append(sys.stdout.getvalue().splitlines())
            yield (number, [f"text {number}"], None)

    monkeypatch.setattr(InternVL, "caption_each", caption_each)
    code, out, _ = run("caption", *photos[:3])
    assert code == 0 and out.splitlines()[1::2] == ["text 0", "text 1", "text 2"]
    assert [lines[1::2] for lines in shown] == [[], ["text 0"], ["text 0", "text 1"]]


def test_a_picture_comes_through_a_pipe(run, photos, engine, monkeypatch):
    def pipe(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    text = engine.caption(photos[0], max_new_tokens=4)[0]
    for name in ("-", "/dev/stdin"):
        pipe(Path(photos[0]).read_bytes())
        assert run("caption", name, "--max-new-tokens", 4) == (0, f"{text}\n", "")
    pipe(Path(photos[0]).read_bytes())
    found = from_json(run("embed", "-", photos[0], "-", "--json"))["embeddings"]["c"]
    assert found[0] == found[2] == pytest.approx(found[1], abs=1e-5)
    pipe(b"")
    code, _, err = run("ask", "-", "what?")
    assert code == 1 and "standard input: not a readable image: it is empty" in err
    monkeypatch.setattr(sys, "stdin", None)
    assert run("ask", "-", "what?")[0] == 2


def test_an_output_that_cannot_be_written_fails_first(run, photos, tmp_path, monkeypatch):
    from internvl_engine import InternVL

    monkeypatch.setattr(InternVL, "from_pretrained", None)  # nothing is loaded
    for command in (
        ["embed", *photos, "-o", tmp_path / "missing" / "x.safetensors"],
        ["demo", "-o", tmp_path / "missing" / "x.png"],
        ["bench", "kernels", "--json", tmp_path / "missing" / "x.json"],
    ):
        code, _, err = run(*command)
        assert code == 1 and "there is no folder" in err and "missing" in err
    (tmp_path / "folder.safetensors").mkdir()
    code, _, err = run("embed", *photos, "-o", tmp_path / "folder.safetensors")
    assert code == 1 and "cannot be written" in err


def test_caption_and_ask(run, photos, engine):
    length = ("--max-new-tokens", 6)
    texts = engine.caption(photos[:2], max_new_tokens=6)
    found = from_json(run("caption", *photos[:2], *length, "--json"))
    assert [row["captions"] for row in found["results"]] == [
        {"English caption:": text} for text in texts
    ]
    assert run("caption", photos[0], *length) == (0, f"{texts[0]}\n", "")
    assert run("caption", photos[0], *length, "--stream") == (0, f"{texts[0]}\n", "")
    beams = engine.caption(photos[0], "a dog", num_beams=2, max_new_tokens=6)
    assert run("caption", photos[0], *length, "--beams", 2, "--prompt", "a dog")[1] == (
        f"{beams[0]}\n"
    )
    questions = ["What is it?", "Is it red?"]
    answers = engine.answer(photos[0], questions, max_new_tokens=6)
    found = from_json(run("ask", photos[0], *questions, *length, "--json"))
    assert [pair["answer"] for pair in found["answers"]] == answers
    assert run("ask", photos[0], questions[1], *length) == (0, f"{answers[1]}\n", "")


def test_embed(run, photos, engine, tmp_path):
    from safetensors.torch import load_file

    expected = engine.encode_image(photos, "both")
    found = from_json(run("embed", *photos, "--text", "a dog", "--mode", "both", "--json"))
    for name in ("c", "g"):
        actual = torch.tensor(found["embeddings"][name])
        torch.testing.assert_close(actual, getattr(expected, name), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        torch.tensor(found["embeddings"]["text"]), engine.encode_text("a dog"), atol=1e-4, rtol=0
    )
    file = tmp_path / "vectors.safetensors"
    found = from_json(run("embed", *photos, "-o", file, "--json"))
    assert found["shapes"] == {"c": [5, 48]}
    torch.testing.assert_close(load_file(file)["c"], expected.c, atol=1e-4, rtol=0)
    code, out, _ = run("embed", "--text", "a dog", "--text", "two")
    assert [line.split("\t")[:2] for line in out.splitlines()] == [
        ["text", "a dog"],
        ["text", "two"],
    ]


def test_index_and_search(run, photos, engine):
    folder = str(Path(photos[0]).parent)
    (Path(folder) / "bad.jpg").write_bytes(b"no image")
    (Path(folder) / "notes.txt").write_text("no image by its name")
    found = from_json(run("index", folder, "--json"))
    assert (found["images"], found["added"]) == (5, 5) and list(found["broken"]) == ["bad.jpg"]
    code, out, err = run("index", folder)
    assert code == 0 and "0 new, 6 known, 0 gone, 1 broken" in out
    lines = err.splitlines()
    assert lines[0].startswith("internvl: left out bad.jpg: ")
    assert lines[1:] == ["internvl: no images by their names: 1 .txt"]
    found = from_json(run("search", folder, "a dog", "-k", 3, "--json"))
    scores = engine.similarity(photos, "a dog")[:, 0]
    order = scores.argsort(descending=True)[:3].tolist()
    assert [hit["path"] for hit in found["results"]] == [photos[i] for i in order]
    found = from_json(run("search", folder, "--image", photos[3], "--json"))
    assert found["results"][0]["path"] == photos[3] and found["results"][0]["name"] == "d.png"
    assert run("search", folder, "a dog")[1].split()[:2] == ["score", "image"]


def test_verify_and_convert(run, checkpoint, tmp_path):
    found = from_json(run("verify", checkpoint, "--json"))
    assert found["ok"] is True and found["parameters"] > 0
    found = from_json(
        run(
            "convert",
            checkpoint,
            tmp_path / "half",
            "--dtype",
            "bfloat16",
            "--parts",
            "c",
            "--json",
        )
    )
    assert "config.json" in found["files"]
    (weights,) = (tmp_path / "half").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-50])
    code, out, err = run("verify", tmp_path / "half", "--json")
    assert code == 1 and json.loads(out)["ok"] is False and "damaged" in err
    code, _, err = run("convert", checkpoint, tmp_path / "half")
    assert code == 1 and "holds weights already" in err


def test_convert_a_chat_checkpoint_into_another_layout(run, tmp_path):
    source = folder_of(tmp_path / "a", "qwen2_300m_v2")
    (source / "added_tokens.json").write_text('{"<IMG_CONTEXT>": 123}')
    arguments = ("convert", source, tmp_path / "b", "--layout", "transformers", "--json")
    assert "model.safetensors" in from_json(run(*arguments))["files"]
    code, out, err = run("verify", tmp_path / "b", "--json")
    findings = {each["check"]: each["passed"] for each in json.loads(out)["findings"]}
    assert code == 1 and findings["tokenizer"] is False and "not one that is known here" in err
    assert findings["finite"] and findings["names and shapes"]
    code, _, err = run("convert", source, tmp_path / "c", "--layout", "gguf")
    assert code == 1 and "layout must be 'published' or 'transformers', got 'gguf'" in err


def documented_commands() -> list[str]:
    """Every `internvl ...` that the documents tell people to type."""
    files = [
        ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/results/README.md")
    ]
    typed = re.compile(r"(?m)(?:^|[`&=\w]\s|`)(internvl [a-z][^`#&|\n]*)")
    return sorted({match.strip() for file in files for match in typed.findall(file.read_text())})


@pytest.mark.parametrize("line", documented_commands())
def test_every_documented_command_and_option_exists(run, line):
    code, out, err = run(*shlex.split(line)[1:], "--help")
    assert code == 0 and "Usage" in out, err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["classify", "nothing.jpg", "-l", "a,b"], "nothing.jpg: no such image file"),
        (["caption", "{text}"], "not a readable image"),
        (["ask", "nothing.jpg", "a"], "no such image file"),
        (["embed", "nothing.jpg"], "no such image file"),
        (["index", "nowhere"], "nowhere is not a folder"),
        (["search", "nowhere", "a"], "there is no index in nowhere"),
        (["classify", "{photo}", "-l", "@nothing.txt"], "no such file: nothing.txt"),
        (["classify", "{photo}", "-l", "a,b", "--model", "{folder}"], "no weights here"),
        (["caption", "{photo}", "--dtype", "int3"], "dtype"),
        (["caption", "{photo}", "--min-new-tokens", "40"], "min_new_tokens between"),
        (["ask", "{photo}", "a", "--template", "Q"], "'Q' has no {{}}"),
        (["convert", "nowhere", "{folder}/out"], "nowhere"),
        (["verify", "nowhere"], "nowhere"),
    ],
)
def test_a_failure_is_one_line_and_exit_code_1(run, photos, tmp_path, arguments, message):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty").mkdir()
    names = {"photo": photos[0], "text": tmp_path / "text.jpg", "folder": tmp_path / "empty"}
    arguments = [argument.format(**names) for argument in arguments]
    code, out, err = run(*arguments)
    assert code == 1 and message.format() in err
    assert len(err.splitlines()) == 1 and err.startswith("internvl: ")
    assert arguments[0] in ("verify", "embed") or not out
    code, out, _ = run(*arguments, "--json")
    assert code == 1
    assert message.format() in json.loads(out)["error"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["classify"],
        ["classify", "a.jpg"],
        ["classify", "a.jpg", "-l", " , "],
        ["classify", "a.jpg", "-l", "a", "--mode", "x"],
        ["classify", "a.jpg", "-l", "a", "--top", "0"],
        ["caption", "a.jpg", "b.jpg", "--stream"],
        ["caption", "a.jpg", "--stream", "--json"],
        ["ask", "a.jpg"],
        ["embed"],
        ["embed", "a.jpg", "-o", "a.npy"],
        ["search", "folder"],
        ["search", "folder", "text", "--image", "a.jpg"],
        ["index"],
    ],
)
def test_wrong_usage_is_exit_code_2(run, arguments):
    code, out, err = run(*arguments)
    assert code == 2 and (not out or "--json" in arguments) and "Usage" in err


def test_wrong_usage_is_an_object_too(run, photos):
    code, out, err = run("classify", photos[0], "-l", "a", "--mode", "x", "--json")
    assert code == 2 and json.loads(out) == {
        "error": "Invalid value for --mode: 'x' is not one of c, g"
    }


def test_debug_shows_where(run, capsys):
    with pytest.raises(NotADirectoryError):
        main(["index", "nowhere", "--debug"])


def test_an_error_of_ours_names_itself(run, photos, monkeypatch):
    from internvl_engine import InternVL

    def fail(*arguments, **options):
        raise KeyError("broken")

    monkeypatch.setattr(InternVL, "caption_each", fail)
    code, _, err = run("caption", photos[0])
    assert (code, err) == (1, "internvl: KeyError: 'broken' (--debug shows where)\n")


def test_interruption_is_quiet(run, photos, monkeypatch):
    from internvl_engine import InternVL

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(InternVL, "caption_each", interrupt)
    assert run("caption", photos[0]) == (130, "", "internvl: interrupted\n")


def test_without_a_model_it_says_that_nano_serves(run, monkeypatch, tmp_path):
    from internvl_engine import InternVL

    monkeypatch.delenv("INTERNVL_MODEL")
    monkeypatch.setattr(InternVL, "nano", classmethod(lambda cls, **options: tiny_engine()))
    code, out, err = run("embed", "--text", "a", "--json")
    assert code == 0 and json.loads(out)["model"] == "tiny-0"
    assert "no --model and no INTERNVL_MODEL: using the embedded nano model" in err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()  # is ./nano, never meant by "nano"
    assert from_json(run("embed", "--text", "a", "--json", "-m", "nano"))["model"] == "tiny-0"
