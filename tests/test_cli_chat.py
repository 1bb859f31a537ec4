"""`internvl chat`: single questions, conversations from pipes and on terminals, errors."""

import io
import json
import sys

import pytest
from PIL import Image
from tiny_chat import picture, tiny_chat

from internvl_engine.cli import main

SHORT = ("--max-new-tokens", "6")
OPTIONS = {"max_new_tokens": 6}


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory) -> str:
    engine, folder = tiny_chat(), tmp_path_factory.mktemp("chat")
    engine.model.save_pretrained(folder)
    engine.processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def engine(chat_folder):
    from internvl_engine import InternVLChat

    return InternVLChat.from_pretrained(chat_folder)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    for name, size in (("a.png", (60, 30)), ("b c.png", (20, 20)), ("d.png", (30, 60))):
        Image.fromarray(picture(*size)).save(tmp_path / name)
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Typed(io.StringIO):
    """Lines typed at a terminal; None is Ctrl-C."""

    def __init__(self, lines):
        super().__init__()
        self.lines = list(lines)

    def isatty(self):
        return True

    def input(self, prompt):
        sys.stdout.write(prompt)
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if line is None:
            raise KeyboardInterrupt
        return line


@pytest.fixture
def run(capsys, monkeypatch, chat_folder, photos):
    """Runs the command in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("INTERNVL_CHAT_MODEL", chat_folder)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str, piped: str | bytes | None = None, typed=None):
        if piped is not None:
            content = piped if isinstance(piped, bytes) else piped.encode()
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        if typed is not None:
            terminal = Typed(typed)
            monkeypatch.setattr(sys, "stdin", terminal)
            monkeypatch.setattr("builtins.input", terminal.input)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main(["chat", *SHORT, *arguments])
        out, err = capsys.readouterr()
        return exit.value.code or 0, out, err

    return call


def shown(text: str) -> str:
    from internvl_engine.printable import printable

    return "\n".join(printable(line, None) for line in text.split("\n"))


def test_one_question(run, engine):
    expected = engine.chat("a.png", "What is this?", **OPTIONS)
    assert run("a.png", "What is this?") == (0, shown(expected) + "\n", "")
    code, out, err = run("a.png", "b c.png", "What?", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {
        "model": engine.name, "images": ["a.png", "b c.png"], "question": "What?",
        "answer": engine.chat(["a.png", "b c.png"], "What?", **OPTIONS),
    }  # fmt: skip


def test_a_question_needs_no_picture(run, engine):
    assert run("Hello there")[1] == shown(engine.chat(question="Hello there", **OPTIONS)) + "\n"
    assert run("-q", "a.png")[1] == shown(engine.chat(question="a.png", **OPTIONS)) + "\n"


def test_options_reach_the_model(run, engine):
    expected = engine.chat("a.png", "What?", system_message="Sing.", max_tiles=1, num_beams=3,
                           **OPTIONS)  # fmt: skip
    options = ("--system", "Sing.", "--max-tiles", "1", "--beams", "3")
    assert run("a.png", "What?", *options)[1] == shown(expected) + "\n"
    video = engine.chat(videos=["a.png", "d.png"], question="What?", **OPTIONS)
    folder = Image.open("a.png"), Image.open("d.png")
    import pathlib

    pathlib.Path("film").mkdir()
    for number, frame in enumerate(folder):
        frame.save(f"film/{number}.png")
    code, out, _ = run("What?", "--video", "film", "--json")
    assert code == 0 and json.loads(out)["answer"] == video
    assert json.loads(out)["videos"] == ["film"]
    assert run("a.png", "What?", "--temperature", "2")[0] == 0


def test_a_picture_through_a_pipe(run, engine, photos):
    expected = shown(engine.chat("a.png", "What?", **OPTIONS)) + "\n"
    assert run("-", "What?", piped=(photos / "a.png").read_bytes())[1] == expected
    code, _, err = run("-", piped=(photos / "a.png").read_bytes())
    assert code == 2 and "standard input is a picture; give the question" in err


@pytest.mark.parametrize("arguments, message", [
    (("gone.png", "What?"), "gone.png: no such image file"),
    (("gone.png",), "gone.png: no such image file"),
    (("a.png", "bad.jpg", "What?"), "bad.jpg: not a readable image"),
    (("What?", "a.png", "b.png", "Is it?"), "What?: no such image file"),
    (("a.png", "<image> <image>"), "1 image came with 2 places"),
    (("x", "--video", "gone.mp4"), "gone.mp4: no such video"),
    (("x", "--model", "nowhere"), "nowhere"),
])  # fmt: skip
def test_bad_input_is_one_line_and_an_object(run, arguments, message):
    code, out, err = run(*arguments, piped="")
    assert code == 1 and out == "" and err.startswith("internvl: ") and message in err
    assert err.count("\n") == 1
    code, out, err = run(*arguments, "--json", piped="")
    assert code == 1 and message in json.loads(out)["error"]


def test_a_missing_embedded_model_says_so(run, monkeypatch):
    def gone():
        raise FileNotFoundError("this installation has no embedded chat model")

    monkeypatch.setattr("internvl_engine.assets.nano_chat_directory", gone)
    code, out, err = run("x", "--model", "nano-chat")
    assert (code, out) == (1, "") and "no embedded chat model" in err
    monkeypatch.delenv("INTERNVL_CHAT_MODEL")
    assert "no --model and no INTERNVL_CHAT_MODEL: using the embedded nano-chat" in run("x")[2]


def test_pictures_are_checked_before_a_model_is_loaded(run, monkeypatch):
    from internvl_engine import InternVLChat

    monkeypatch.setattr(InternVLChat, "from_pretrained", None)
    assert "no such image file" in run("gone.png", "What?")[2]


@pytest.mark.parametrize("question", ["", "  "])
def test_an_empty_question_is_wrong_usage(run, question):
    assert run("a.png", question)[0] == 2


def conversation(engine, asked) -> str:
    """What is printed of a conversation of (images, question) pairs."""
    text, history = "", None
    for images, question in asked:
        answer, history = engine.chat(
            images or None, question, history=history, return_history=True, **OPTIONS
        )
        text += shown(answer) + "\n"
    return text


def test_a_conversation_from_a_pipe(run, engine):
    lines = 'one\n\n/image b c.png\n/image d.png "b c.png"\ntwo\n/reset\n three \r\n/quit\nfour'
    code, out, err = run("a.png", piped="\ufeff" + lines)
    first = [(["a.png"], "one"), (["b c.png", "d.png", "b c.png"], "two")]
    assert (code, err) == (0, "")
    assert out == conversation(engine, first) + conversation(engine, [(None, "three")])


def test_a_pipe_goes_on_after_an_error_and_fails_in_the_end(run, engine):
    lines = "one\n/image gone.png\n/nope\n<image>\ntwo"
    code, out, err = run(piped=lines)
    assert code == 1 and out == conversation(engine, [(None, "one"), (None, "two")])
    assert [line.partition(": ")[2].split(":")[0] for line in err.splitlines()] == [
        "gone.png", "/nope", "0 images came with 1 place for them; write <image> once for each",
    ]  # fmt: skip
    code, out, err = run("--json", piped="one\n/nope\ntwo")
    document = json.loads(out)
    assert code == 1 and document["error"].startswith("/nope: no such command")
    assert [turn.get("question") for turn in document["turns"]] == ["one", "/nope", "two"]
    assert document["turns"][0]["answer"] == engine.chat(question="one", **OPTIONS)


def test_an_empty_pipe_is_an_empty_conversation(run):
    assert run(piped="") == (0, "", "")
    assert json.loads(run("--json", piped="\n")[1])["turns"] == []


def test_a_pipe_need_not_be_unicode(run):
    assert run(piped=b"caf\xe9?\n")[0] == 0


def test_a_conversation_on_a_terminal(run, engine):
    code, out, err = run("a.png", typed=["one", "/help", "/image gone.png", "two"])
    expected = conversation(engine, [(["a.png"], "one"), (None, "two")]).splitlines(True)
    assert code == 0 and out.replace("> ", "") == "".join(expected) + "\n"
    assert "/image PATH" in err and "gone.png: no such image file" in err


def test_interruptions_on_a_terminal_are_quiet(run, engine, monkeypatch):
    assert run(typed=[None])[:2] == (0, "> \n")
    from internvl_engine import InternVLChat

    chat, calls = InternVLChat.chat, []

    def interrupted(self, *args, **options):
        stream = chat(self, *args, **options)
        calls.append(len(options["history"] or []))
        if len(calls) > 1:
            return stream
        took = stream._pieces

        def some():
            yield next(took)
            raise KeyboardInterrupt

        stream._pieces = some()
        return stream

    monkeypatch.setattr(InternVLChat, "chat", interrupted)
    code, out, err = run(typed=["one", "two"])
    assert code == 0 and calls == [0, 2]  # what was said of the first answer is kept
    assert "Traceback" not in err
