"""Errors of loading: each names the file, the key, what was needed and what came."""

from collections.abc import Iterable

SHOWN = 5  # names listed in a message; a checkpoint has a thousand


class CheckpointError(ValueError):
    """A checkpoint is damaged, or is not what the model needs."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A checkpoint, or one of its files, is not there."""


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many there are beyond."""
    names = sorted(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
