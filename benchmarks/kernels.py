"""The operators' benchmarks: every bench_<operator>.py of this folder."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from .report import Suites


def operators() -> list[str]:
    """Every operator that has a bench_<operator>.py."""
    folder = Path(__file__).parent
    return sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))


def suites(only: Sequence[str] = ()) -> Suites:
    """The cases of the operators in `only`, of all where empty.

    Raises:
        ValueError: there is no such operator.
    """
    unknown = set(only) - set(operators())
    if unknown:
        raise ValueError(
            f"bench: no benchmark of {', '.join(sorted(unknown))}; there are "
            f"{', '.join(operators())}"
        )
    return {
        name: import_module(f".bench_{name}", __package__).cases for name in only or operators()
    }
