"""How commands speak: results on stdout, all else on stderr, one line for what goes wrong.

What comes from outside (names of files, labels, texts of a model) is shown with its control
characters escaped: a terminal would obey them. Nothing here, and nothing that the commands import
at their head, loads torch: `internvl --help` answers at once.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..printable import printable
from .options import described_as, flatten_options

INTERRUPTED, BROKEN_PIPE = 130, 141  # as shells call a program ended by SIGINT and by SIGPIPE
MESSAGE = 500  # characters of the longest error
# Characters that JSON leaves as they are and a terminal obeys.
CONTROLS = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def command(app: typer.Typer, name: str | None = None) -> Callable[[Callable], Callable]:
    """Registers a function as a command that ends cleanly whatever happens in it.

    A parameter that is a NamedTuple of options becomes these options, and every command has
    `--debug`, which shows tracebacks. Where the function has a keyword `as_json` and it is on, an
    error is also an object on stdout.
    """

    def register(function: Callable) -> Callable:
        flat = flatten_options(function)

        def run(*, debug: Debug = False, **options: Any) -> None:
            prepare_streams()
            try:
                flat(**options)
                sys.stdout.flush()
            except (typer.Exit, typer.Abort):
                raise
            except typer.BadParameter as error:
                _report(printable(error.format_message(), MESSAGE), options)
                raise
            except KeyboardInterrupt:
                notice("interrupted")
                raise typer.Exit(INTERRUPTED) from None
            except BrokenPipeError:
                # What is still buffered must not be written when Python ends.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(BROKEN_PIPE) from None
            except Exception as error:
                if debug:
                    raise
                message = _in_one_line(error)
                _say(message)
                _report(message, options)
                raise typer.Exit(1) from None

        return app.command(name or function.__name__)(described_as(run, flat))

    return register


def notice(message: str) -> None:
    """Says something that is not the result."""
    _say(printable(message, MESSAGE))


def _say(message: str) -> None:
    try:
        typer.echo(f"internvl: {message}", err=True)
    except BrokenPipeError:  # nobody listens
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def show(text: Any, *, end: str = "\n") -> None:
    """Prints a result, at once."""
    lines = [printable(line, None) for line in str(text).split("\n")]
    typer.echo("\n".join(lines) + end, nl=False)


def print_json(document: Any) -> None:
    """The result of a command as one JSON document."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    text = json.dumps(document, indent=2, ensure_ascii=not unicode, allow_nan=False)
    sys.stdout.write(CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")


def print_table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, indent: str = "") -> None:
    """Aligned columns under their names, numbers to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    columns = list(zip(head, *cells, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [bool(cells) and all(text[:1].isdigit() for text in column[1:]) for column in columns]
    for number, line in enumerate([list(head), *cells] if any(head) else cells):
        fitted = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ]
        typer.secho(indent + "  ".join(fitted).rstrip(), bold=any(head) and number == 0)


def print_title(text: str) -> None:
    """A heading, on one line after those that it begins with."""
    title = text.lstrip("\n")
    typer.secho("\n" * (len(text) - len(title)) + printable(title, None), bold=True)


def progress(total: int | None, unit: str) -> Any:
    """A tqdm bar on a terminal; in a pipe it stays silent."""
    from tqdm import tqdm

    columns, lines = shutil.get_terminal_size()  # 80 x 24 on a terminal without a size
    return tqdm(
        total=total,
        unit=f" {unit}",
        disable=not sys.stderr.isatty(),
        leave=False,
        ncols=columns,
        nrows=lines,
    )


def check_writable(path: Path, option: str) -> None:
    """Raises before anything is computed where a file could not be written in the end.

    Args:
        path: of the file.
        option: what gave it, for the message.

    Raises:
        FileNotFoundError: the folder that it would be in is not there.
        PermissionError: it is a folder, or must not be written.
    """
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{option}: there is no folder {folder} to write {path.name} in")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise PermissionError(f"{option}: {path} cannot be written")


def prepare_streams() -> None:
    """Makes the streams fit for names that are not Unicode, and for a caller who closed them."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _report(message: str, options: dict[str, Any]) -> None:
    """An error for a program that reads stdout."""
    if options.get("as_json"):
        print_json({"error": message})


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else printable(value, None)


def _in_one_line(error: Exception) -> str:
    text = printable(" ".join(str(error).split()), MESSAGE) or type(error).__name__
    if isinstance(error, ImportError) and "pip install" not in text:
        return f"{text} (internvl doctor says which packages are broken)"
    if isinstance(error, (ValueError, OSError, ImportError)):
        return text
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of memory; take a smaller --batch-size, or another --dtype ({text[:120]})"
    return f"{type(error).__name__}: {text} (--debug shows where)"
