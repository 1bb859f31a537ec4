"""A conversation that goes on: its history, its pictures, and the loop that reads questions.

On a terminal the loop has a prompt and Ctrl-C ends an answer, or the loop where there is none;
from a pipe every line is a question.
"""

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import typer

from .console import notice, print_json, show

if TYPE_CHECKING:
    from ..engine import InternVLChat

PROMPT = "> "
HELP = """/image PATH   add a picture to the next question
/reset        begin again, without pictures
/help         this
/quit         leave (or Ctrl-D)"""


class Conversation:
    """What was said, and the pictures for the next question.

    Args:
        engine: that answers.
        options: of `InternVLChat.chat`.
        pictures: for the first question.
        names: of the pictures.
        videos: for the first question.
    """

    def __init__(
        self,
        engine: "InternVLChat",
        options: dict[str, Any],
        pictures: list[Any],
        names: list[str],
        videos: list[str],
    ) -> None:
        self.engine, self.options = engine, options
        self.pictures, self.names, self.videos = pictures, names, videos
        self.history: list[Any] = []

    def given(self) -> dict[str, Any]:
        """The pictures of the next question by name, as a document has them."""
        return {"images": list(self.names)} | ({"videos": self.videos} if self.videos else {})

    def add(self, path: str) -> None:
        """Adds a picture to the next question.

        Raises:
            ValueError, OSError: it cannot be used.
        """
        from ..processing import load_image

        load_image(path)
        self.pictures.append(path)
        self.names.append(path)

    def reset(self) -> None:
        """Forgets what was said and shown."""
        self.history, self.pictures, self.names, self.videos = [], [], [], []

    def ask(self, question: str, send: Callable[[str], object] | None = None) -> str:
        """The answer to a question, which becomes part of the history.

        Args:
            question: a text.
            send: gets the pieces of the answer as they are made. An interruption then ends the
                answer, and what is there of it stays.
        """
        pictures: dict[str, Any] = {
            "images": self.pictures or None, "videos": self.videos or None,
            "history": self.history or None, "question": question,
        }  # fmt: skip
        if send is None or self.options["num_beams"] > 1:
            answer, self.history = self.engine.chat(**pictures, **self.options, return_history=True)
            if send is not None:
                send(answer)
        else:
            stream = self.engine.chat(**pictures, **self.options, stream=True)
            try:
                for piece in stream:
                    send(piece)
            finally:
                stream.close()
                if stream.answer:
                    self.history = stream.history
            answer, self.history = stream.answer, stream.history
        self.pictures, self.names, self.videos = [], [], []
        return answer


def talk(conversation: Conversation, as_json: bool) -> None:
    """Answers the lines of standard input until they end.

    Args:
        conversation: to go on with.
        as_json: print one document in the end.

    Raises:
        typer.Exit: with code 1 where a line of a pipe could not be answered.
    """
    if sys.stdin is None:
        raise typer.BadParameter("there is no standard input; give a question")
    on_terminal = sys.stdin.isatty()
    turns: list[dict[str, Any]] = []
    if on_terminal:
        notice(f"{conversation.engine.name}; /help lists the commands")
    for line in _lines(on_terminal):
        given = conversation.given()
        try:
            if line.startswith("/"):
                if not _obey(conversation, line):
                    break
                continue
            if as_json:
                answer = conversation.ask(line)
                turns.append({**given, "question": line, "answer": answer})
                continue
            conversation.ask(line, lambda piece: show(piece, end=""))
            show("")
        except KeyboardInterrupt:
            if not on_terminal:
                raise
            show("")
        except (ValueError, OSError, ImportError, TypeError) as error:
            notice(str(error))
            turns.append({"question": line, "error": str(error)})
    failed = [turn for turn in turns if "error" in turn]
    if as_json:
        document = {"model": conversation.engine.name, "turns": turns}
        print_json(document | ({"error": failed[0]["error"]} if failed else {}))
    if failed and not on_terminal:
        raise typer.Exit(1)


def _lines(on_terminal: bool) -> Iterator[str]:
    """Lines with words in them, until the end or an interruption between two."""
    if on_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives `input` its editing
    elif hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input(PROMPT) if on_terminal else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            if not on_terminal:
                raise
            show("")
            return
        if not line and not on_terminal:
            return
        if line.strip():
            yield line.strip().removeprefix("\ufeff")


def _obey(conversation: Conversation, line: str) -> bool:
    """Does what a line says that begins with a slash; whether to go on.

    Raises:
        ValueError, OSError: it cannot be done.
    """
    name, _, rest = line.partition(" ")
    if name in ("/quit", "/exit"):
        return False
    if name == "/reset":
        conversation.reset()
    elif name == "/image" and rest.strip():
        for path in _paths(rest.strip()):
            conversation.add(path)
    elif name == "/help":
        typer.echo(HELP, err=True)
    else:
        raise ValueError(f"{line}: no such command; /help lists them")
    return True


def _paths(text: str) -> list[str]:
    """The paths in what follows /image: one as it is, or several as a shell takes them."""
    if os.path.exists(text):
        return [text]
    try:
        return shlex.split(text)
    except ValueError:  # a quotation mark in a name
        return [text]
