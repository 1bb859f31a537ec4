"""What is in a folder of images, what is in it no longer, and what could not be seen."""

import os
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        "jpg jpeg jpe jfif png apng webp bmp gif tif tiff ppm pgm jp2 ico avif heic heif"
    ).split()
)


@dataclass
class Listing:
    """A folder as it was listed.

    files: name in the index (relative, with slashes) to path, sorted.
    skipped: how many files of each other ending were left out.
    unread: folders that could not be listed, relative, and the reasons.
    """

    files: dict[str, Path] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    unread: dict[str, str] = field(default_factory=dict)


def list_images(
    folder: Path, recursive: bool, extensions: Collection[str], index: Path | None = None
) -> Listing:
    """Lists the images of a folder.

    Args:
        folder: names that begin with a dot are left out, links to folders not followed.
        recursive: also the folders in it.
        extensions: with the dot, in lower case.
        index: a folder that is left out.
    """
    found = Listing()

    def cannot(error: OSError) -> None:
        found.unread[_relative(error.filename, folder)] = error.strerror or str(error)

    for here, folders, names in os.walk(folder, onerror=cannot):
        kept = [f for f in sorted(folders) if not f.startswith(".") and Path(here, f) != index]
        folders[:] = kept if recursive else []
        for name in sorted(names):
            path = Path(here, name)
            if name.startswith("."):
                continue
            if path.suffix.lower() in extensions:
                found.files[_relative(path, folder)] = path
            elif path.parent != index:
                found.skipped[path.suffix.lower() or name] += 1
    return found


def normal_extensions(extensions: str | Iterable[str]) -> frozenset[str]:
    """Extensions in lower case with their dots, of "png", ".PNG" or several."""
    several = [extensions] if isinstance(extensions, str) else extensions
    return frozenset(f".{one.lower().removeprefix('.')}" for one in several)


def gone(names: Iterable[str], folder: Path, listing: Listing) -> tuple[list[str], dict[str, str]]:
    """Which files are no more, and which cannot be seen for the present.

    A file is gone where the folder that held it, or the nearest one above that is left, was listed
    and shows other things. An empty folder may be one whose disk is not mounted.

    Args:
        names: of files that are not in the listing.
        folder: that was listed.
        listing: of it.

    Returns:
        The names that are gone, and the others that have to be said: folder to reason.
    """
    lost: list[str] = []
    unseen: dict[str, str] = {}
    for name in names:
        unread = next((up for up in _above(name) if up in listing.unread), None)
        if unread is not None:
            unseen[unread] = listing.unread[unread]
            continue
        try:
            os.lstat(folder / name)  # of another ending, or in a folder that was not asked for
        except (FileNotFoundError, NotADirectoryError):
            left = next(up for up in _above(name) if up == "." or (folder / up).is_dir())
            reason = _unlike_deletion(folder / left)
            if reason is None:
                lost.append(name)
            else:
                unseen[left] = reason
        except OSError as error:
            unseen[name] = error.strerror or str(error)
    return lost, unseen


def _unlike_deletion(folder: Path) -> str | None:
    """Why a folder may look as if files were deleted, or None."""
    try:
        with os.scandir(folder) as entries:
            return None if next(entries, None) else "it is empty, as a disk that is not mounted"
    except OSError as error:
        return error.strerror or str(error)


def _above(name: str) -> list[str]:
    """The folders that a file is in, the innermost first, "." last."""
    parts = name.split("/")[:-1]
    return ["/".join(parts[:count]) for count in range(len(parts), 0, -1)] + ["."]


def _relative(path: str | Path, folder: Path) -> str:
    return Path(path).relative_to(folder).as_posix()
