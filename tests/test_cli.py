"""The command line: what comes out, on which stream, with which exit code."""

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_engine import pictures, saved, tiny_engine

from internvl_engine.cli import main

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "internvl_engine.cli"]
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
COMMANDS = "demo classify caption ask embed index search doctor verify convert bench".split()


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


def test_help_is_quick_and_light():
    code = (
        "import sys; from internvl_engine.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'transformers', 'numpy', 'PIL', 'tqdm'} & set(sys.modules))"
    )
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = os.times()
    assert done.stdout.rstrip().endswith("set()"), done.stderr
    user, system = (after[i] - before[i] for i in (2, 3))  # of children
    assert user + system < 1
    for name in COMMANDS:
        assert f"│ {name} " in done.stdout or f"\n  {name} " in done.stdout


def test_without_typer_it_says_so():
    code = "import sys; sys.modules['typer'] = None; from internvl_engine.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "internvl: the command line needs typer: pip install typer\n"


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


def test_labels_from_a_file_and_templates(run, photos, engine, tmp_path):
    (tmp_path / "labels.txt").write_text("cat\n\nred panda, small\n")
    found = from_json(
        run(
            "classify", photos[0], "-l", f"@{tmp_path / 'labels.txt'}", "--template", "{}", "--json"
        )
    )
    labels = {p["label"] for p in found["results"][0]["predictions"]}
    assert labels == {"cat", "red panda, small"}
    expected = engine.classify(photos[0], ["cat", "red panda, small"], templates=["{}"])[0][0]
    best = found["results"][0]["predictions"][0]
    assert best["probability"] == pytest.approx(expected.probability, abs=1e-4)


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
    found = from_json(run("index", folder, "--json"))
    assert (found["images"], found["added"]) == (5, 5) and list(found["broken"]) == ["bad.jpg"]
    code, out, err = run("index", folder)
    assert code == 0 and "0 new, 6 known, 0 gone, 1 broken" in out
    assert err.startswith("internvl: left out bad.jpg: ")
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


def test_doctor(run):
    found = from_json(run("doctor", "--json"))
    assert found["packages"]["torch"] == torch.__version__
    assert set(found["dtype_auto"]) >= {"cpu"} and found["operators"]["rms_norm"]
    sizes = {row["parts"]: row["parameters"] for row in found["internvl_14b"]}
    assert sizes["all"] == 13_834_975_747 and sizes["image"] == 5_936_000_768
    assert sizes["c"] == 12_620_029_697
    assert 0 < found["memory_gb"]["available"] <= found["memory_gb"]["total"]
    code, out, err = run("doctor")
    assert (code, err) == (0, "") and "InternVL-14B here" in out and "rms_norm" in out


def test_doctor_says_what_to_do(monkeypatch):
    from internvl_engine.cli import doctor

    monkeypatch.setattr(doctor, "_native", lambda name: {
        "built": name == "_native_cuda", "instruction_set": None, "error": "no libcuda.so",
    })  # fmt: skip
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "tqdm" else "1")
    problems = {problem["what"]: problem["do"] for problem in doctor.examine()["problems"]}
    assert problems["tqdm is not installed"] == "pip install tqdm"
    assert any("kernels were not built" in what for what in problems)
    assert any("no libcuda.so" in what for what in problems)


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
        (["classify", "{photo}", "-l", "@nothing.txt"], "No such file"),
        (["classify", "{photo}", "-l", "a,b", "--model", "{folder}"], "tokenizer.model"),
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
    code, out, err = run(*(argument.format(**names) for argument in arguments))
    assert code == 1 and message.format() in err
    assert len(err.splitlines()) == 1 and err.startswith("internvl: ")
    assert arguments[0] == "verify" or not out


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
    assert code == 2 and not out and "Usage" in err


def test_debug_shows_where(run, capsys):
    with pytest.raises(FileNotFoundError):
        main(["embed", "nothing.jpg", "--debug"])


def test_an_error_of_ours_names_itself(run, photos, monkeypatch):
    from internvl_engine import InternVL

    def fail(*arguments, **options):
        raise KeyError("broken")

    monkeypatch.setattr(InternVL, "caption", fail)
    code, _, err = run("caption", photos[0])
    assert (code, err) == (1, "internvl: KeyError: 'broken' (--debug shows where)\n")


def test_interruption_is_quiet(run, photos, monkeypatch):
    from internvl_engine import InternVL

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(InternVL, "caption", interrupt)
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


def test_a_broken_pipe_is_quiet(checkpoint, tmp_path):
    """Far more output than a pipe holds, to a reader that leaves at once."""
    texts = [part for number in range(400) for part in ("--text", f"a {number}")]
    with subprocess.Popen(
        [*COMMAND, "embed", *texts, "--model", checkpoint],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ONE_THREAD,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 141
    assert err == ""


def test_a_terminal_has_a_bar_and_ctrl_c_ends_it(checkpoint, tmp_path):
    """On a pseudo-terminal, interrupted as Ctrl-C does, while the bar of a long index moves."""
    picture = Image.fromarray(pictures(1)[0])
    for number in range(600):
        picture.putpixel((0, 0), (number % 256, number // 256, 0))
        picture.save(tmp_path / f"{number}.bmp")
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*COMMAND, "index", tmp_path, "--model", checkpoint, "--batch-size", "1"],
        stdout=subprocess.PIPE, stderr=theirs, text=True, env=ONE_THREAD,
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = b""
        while b" images" not in shown:
            shown += os.read(ours, 1000)
        process.send_signal(signal.SIGINT)
        try:
            while part := os.read(ours, 1000):
                shown += part
        except OSError:  # the terminal's other end is closed
            pass
    os.close(ours)
    assert process.returncode == 130
    assert b"interrupted" in shown and b"Traceback" not in shown
