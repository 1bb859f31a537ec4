"""Commands on folders of images: index and search."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .console import Json, command, notice, print_json, print_table, progress, show
from .model import BatchSize, Mode, ModelOptions, check_mode, parts_for

NO_MODEL = ModelOptions()


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    command(app)(index)
    command(app)(search)


def index(
    folder: Annotated[Path, typer.Argument(help="Folder of images, and all folders in it.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="[default: FOLDER/.internvl_index]")
    ] = None,
    recursive: Annotated[bool, typer.Option(help="Look into folders of the folder.")] = True,
    mode: Mode = "c",
    batch_size: BatchSize = 32,
    model: ModelOptions = NO_MODEL,
    as_json: Json = False,
) -> None:
    """Embed the images of a folder, once, for search; new and changed ones when run again.

    May be interrupted at any time: the next run goes on from there.
    """
    engine = model.load(parts_for(check_mode(mode)))
    with progress(None, "images") as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        options: dict[str, Any] = {"mode": mode, "recursive": recursive}
        found = engine.index(folder, output, batch_size=batch_size, progress=advance, **options)
    report = found.report
    assert report is not None
    if as_json:
        document = {"folder": str(folder), "index": str(found.shards.folder), "images": len(found)}
        print_json({"model": engine.name, "mode": mode, **document, **vars(report)})
        return
    for path, reason in report.broken.items():
        notice(f"left out {path}: {reason}")
    for path, reason in report.kept.items():
        notice(f"kept as it was {path}: {reason}")
    if report.skipped:
        others = ", ".join(f"{count} {ending}" for ending, count in sorted(report.skipped.items()))
        notice(f"no images by their names: {others}")
    show(
        f"{len(found)} images in {found.shards.folder}: {report.added} new, {report.unchanged} "
        f"known, {report.removed} gone, {len(report.broken)} broken ({report.seconds:.1f} s)"
    )


def search(
    folder: Annotated[Path, typer.Argument(help="An index, or the folder that was indexed.")],
    query: Annotated[str | None, typer.Argument(help="A text.")] = None,
    image: Annotated[
        Path | None, typer.Option(help="Search by the likeness to this image instead.")
    ] = None,
    count: Annotated[int, typer.Option("-k", min=1, help="How many to show.")] = 10,
    model: ModelOptions = NO_MODEL,
    as_json: Json = False,
) -> None:
    """Find the images of an indexed folder that fit a text or an image best.

    internvl search photos "a red panda"
    """
    if (query is None) == (image is None):
        raise typer.BadParameter("give a text, or --image", param_hint="QUERY")
    from ..index import FolderIndex

    found = FolderIndex.open(folder)
    mode = found.shards.identity["mode"]
    parts = parts_for(mode, images=image is not None, texts=query is not None)
    engine = model.load(parts)
    hits = found.search(engine, query if image is None else image, count)
    if as_json:
        asked = {"query": query} if image is None else {"image": str(image)}
        results = [hit._asdict() for hit in hits]
        print_json({"model": engine.name, "mode": mode, **asked, "results": results})
        return
    print_table(("score", "image"), [(hit.score, hit.path) for hit in hits])
