"""Labels as the command line gives them: comma-separated, or one a line of a file."""

import codecs
import re
from pathlib import Path

import typer

from ..printable import printable

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_labels(given: list[str]) -> list[str]:
    """The labels of all --labels, in order.

    Args:
        given: each either labels between commas, or @FILE with one label a line. The number of a
            line is often the number of a class, so that empty and equal lines are kept; empty ones
            between commas are not.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is not text in UTF-8 or UTF-16.
        typer.BadParameter: no label at all.
    """
    found: list[str] = []
    for value in given:
        if value.startswith("@"):
            found += read_lines(Path(value[1:]))
        else:
            found += [part.strip() for part in value.split(",") if part.strip()]
    if not any(found):
        raise typer.BadParameter("no label in it", param_hint="--labels")
    return found


def read_lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8, or in UTF-16 with its mark, without space around them."""
    if not path.is_file():
        raise FileNotFoundError(f"--labels: no such file: {printable(path)}")
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith(UTF_16) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"--labels: {printable(path)} is not {encoding.removesuffix('-sig').upper()}: byte "
            f"0x{content[error.start]:02x} in line {line}; save it as UTF-8"
        ) from None
    if "\0" in text:
        raise ValueError(f"--labels: {printable(path)} is not text in UTF-8; save it as that")
    # Only what ends a line in a text file: str.splitlines knows characters of words, too.
    lines = re.split("\r\n|\n|\r", text)
    return [line.strip() for line in (lines[:-1] if lines[-1] == "" else lines)]
