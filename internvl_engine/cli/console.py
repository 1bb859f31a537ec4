"""How commands speak: results on stdout, all else on stderr, one line for what goes wrong.

Nothing here, and nothing that the commands import at their head, loads torch: `internvl --help`
answers at once.
"""

import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import typer

INTERRUPTED, BROKEN_PIPE = 130, 141  # as shells call a program ended by SIGINT and by SIGPIPE

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def command(app: typer.Typer, name: str | None = None) -> Callable[[Callable], Callable]:
    """Registers a function as a command that ends cleanly whatever happens in it.

    The function's keyword `debug` shows tracebacks.
    """

    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> None:
            _prepare_streams()
            try:
                function(*arguments, **options)
                sys.stdout.flush()
            except (typer.Exit, typer.BadParameter, typer.Abort):
                raise
            except KeyboardInterrupt:
                _say("interrupted")
                raise typer.Exit(INTERRUPTED) from None
            except BrokenPipeError:
                # What is still buffered must not be written when Python ends.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(BROKEN_PIPE) from None
            except Exception as error:
                if options.get("debug"):
                    raise
                _say(_in_one_line(error))
                raise typer.Exit(1) from None

        return app.command(name)(run)

    return register


def notice(message: str) -> None:
    """Says something that is not the result."""
    _say(message)


def print_json(document: Any) -> None:
    """The result of a command as one JSON document."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    text = json.dumps(document, indent=2, ensure_ascii=not unicode, allow_nan=False)
    sys.stdout.write(text + "\n")


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
    """A heading."""
    typer.secho(text, bold=True)


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


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _say(message: str) -> None:
    try:
        typer.echo(f"internvl: {message}", err=True)
    except BrokenPipeError:  # nobody listens
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, (ValueError, OSError, ImportError)):
        return text
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of memory; take a smaller --batch-size, or another --dtype ({text[:120]})"
    return f"{type(error).__name__}: {text} (--debug shows where)"


def _prepare_streams() -> None:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of files may not be Unicode
            stream.reconfigure(errors="backslashreplace")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
