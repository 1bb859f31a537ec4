"""The command `internvl`."""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and leaves with its exit code: 0, 1 for a failure, 2 for wrong usage.

    Args:
        arguments: without the program's name; None takes those of this process.
    """
    try:
        import typer  # noqa: F401
    except ImportError:
        sys.exit("internvl: the command line needs typer: pip install typer")
    from .app import app

    app(args=None if arguments is None else list(arguments), prog_name="internvl")
