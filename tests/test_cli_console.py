"""How commands speak, with commands that take no model: streams, terminals, what goes wrong."""

import json
import os
import pty
import signal
import subprocess
import sys

import pytest
import typer

from internvl_engine.cli.console import command, notice, print_json, print_table, print_title, show
from internvl_engine.cli.options import flatten_options

COMMANDS = "demo classify caption ask embed index search doctor verify convert bench".split()
APP = """
import sys, time, typer
from internvl_engine.cli.console import command, progress
app = typer.Typer()
@app.callback()
def _(): pass
def talk():
    for number in range(20_000):
        typer.echo(f"line {number}")
def work():
    with progress(1000, "images") as bar:
        for _ in range(1000):
            bar.update()
            time.sleep(0.02)
def fail(as_json: bool = False):
    raise ValueError("broken")
for function in (talk, work, fail):
    command(app)(function)
app()
"""


def start(*arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", APP, *arguments], text=True, **options)


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


def test_without_typer_it_says_so(monkeypatch):
    from internvl_engine.cli import main

    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match="the command line needs typer: pip install typer"):
        main()


def test_a_broken_pipe_is_quiet():
    """Far more output than a pipe holds, to a reader that leaves at once."""
    with start("talk", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


@pytest.mark.parametrize("name, code", [("talk", 0), ("fail", 1)])
def test_closed_streams_are_quiet(name, code):
    """As `internvl ... >&- 2>&-` starts it."""
    shell = f'exec "$0" -c "$1" {name} >&- 2>&-'
    done = subprocess.run(["sh", "-c", shell, sys.executable, APP], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_a_terminal_has_a_bar_and_ctrl_c_ends_it():
    """On a pseudo-terminal, interrupted as Ctrl-C does, while the bar moves."""
    ours, theirs = pty.openpty()
    with start("work", stdout=subprocess.PIPE, stderr=theirs) as process:
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


def test_control_characters_are_escaped_wherever_text_comes_out(capsys):
    text = "\x1b[2Jred\x9b\u202e"
    show(text)
    print_title(text)
    print_table(("", ""), [(text, 0.5)])
    notice(text)
    print_json({"name": text})
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "\x9b" not in out + err and "\u202e" not in out + err
    assert out.count(r"\x1b[2Jred\x9b\u202e") == 3
    assert json.loads(out[out.index("{") :]) == {"name": text}
    print_title("\n\na\nb")
    assert capsys.readouterr().out == "\n\na\\nb\n"
    show("two\nlines", end="")
    assert capsys.readouterr().out == "two\nlines"


@pytest.fixture
def failing(capsys):
    """Runs a command that raises: (exit code, stdout, stderr)."""

    def call(error: Exception, *arguments: str) -> tuple[int, str, str]:
        app = typer.Typer()

        def fail(as_json: bool = False) -> None:
            raise error

        command(app)(fail)
        with pytest.raises(SystemExit) as exit:
            app(list(arguments))
        return exit.value.code, *capsys.readouterr()

    return call


def test_an_error_is_one_bounded_line_and_an_object(failing):
    code, out, err = failing(ValueError("no\x1b such\nthing " + "A" * 3_000_000), "--as-json")
    assert code == 1 and len(err.splitlines()) == 1 and len(err) < 600
    assert err.startswith("internvl: no\\x1b such thing AAA")
    assert json.loads(out) == {"error": err.removeprefix("internvl: ").rstrip()}
    assert "internvl doctor says which" in failing(ImportError("undefined symbol: _ZN3c10"))[2]
    assert failing(ImportError("pip install x"))[2] == "internvl: pip install x\n"
    assert failing(KeyError("x")) == (1, "", "internvl: KeyError: 'x' (--debug shows where)\n")


def test_options_in_common_are_spread_into_a_command(capsys):
    from typing import NamedTuple

    class Place(NamedTuple):
        where: str = "here"
        depth: int = 1

    def go(name: str, place: Place = Place(), fast: bool = False) -> None:  # noqa: B008
        show(f"{name} {place.where} {place.depth} {fast}")

    assert list(flatten_options(go).__annotations__) == ["name", "where", "depth", "fast"]
    app = typer.Typer()
    command(app)(go)
    for arguments, expected in (
        (["x"], "x here 1 False"),
        (["x", "--where", "there", "--depth", "3", "--fast"], "x there 3 True"),
    ):
        with pytest.raises(SystemExit):
            app(arguments)
        assert capsys.readouterr().out == f"{expected}\n"
