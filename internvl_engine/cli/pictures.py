"""The pictures that a command was given: read from the command line, taken one after another."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import typer

from .console import notice, progress

if TYPE_CHECKING:
    from ..embedding import Outcome

STANDARD_INPUT = ("-", "/dev/stdin")


class StandardInput(BytesIO):
    """The picture that came through a pipe, under the name that errors have for it."""

    name = "standard input"


def sources(names: Sequence[str]) -> list[Any]:
    """What to give the engine for the images of the command line; - is standard input."""
    piped = [name for name in names if name in STANDARD_INPUT]
    if not piped:
        return list(names)
    if sys.stdin is None or sys.stdin.isatty():
        raise typer.BadParameter("standard input is no picture here", param_hint="IMAGE...")
    content = StandardInput(sys.stdin.buffer.read())
    return [content if name in STANDARD_INPUT else name for name in names]


class Results:
    """What came of every picture, while it comes: shown, counted and, for --json, kept.

    Args:
        names: the pictures as they were given.
        show: prints the value of one as text, from its name; None where everything is printed in
            the end.
    """

    def __init__(self, names: Sequence[str], show: Callable[[str, Any], None] | None) -> None:
        self.names, self.show = names, show
        self.values: dict[int, Any] = {}
        self.errors: dict[int, str] = {}

    def take(self, outcomes: "Iterable[Outcome]") -> None:
        """Runs what is to be done, with a bar, and names the pictures that cannot be used."""
        with progress(len(self.names), "images") as bar:
            for number, value, error in outcomes:
                if error is not None:
                    self.errors[number] = str(error).removeprefix(f"image {number}: ")
                    bar.clear()
                    notice(self.errors[number])
                else:
                    self.values[number] = value
                    if self.show is not None:
                        bar.clear()
                        self.show(self.names[number], value)
                        sys.stdout.flush()  # also into a pipe: the next may take a while
                bar.update()

    def rows(self, describe: Callable[[Any], dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """An object for every picture, in order: what `describe` makes of its value, or `error`."""
        for number, name in enumerate(self.names):
            if number in self.values:
                yield {"image": name, **describe(self.values[number])}
            elif number in self.errors:
                yield {"image": name, "error": self.errors[number]}

    def failure(self) -> dict[str, str]:
        """What a document says of pictures that could not be used: nothing where all could."""
        if not self.errors:
            return {}
        count = f"{len(self.errors)} of {len(self.names)} images could not be used"
        return {"error": count if len(self.names) > 1 else self.errors[0]}

    def finish(self) -> None:
        """Leaves with exit code 1 where a picture could not be used."""
        if self.errors:
            raise typer.Exit(1)
