"""Commands on this machine and on checkpoints: demo, doctor, verify, convert."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import Json, check_writable, command, notice, print_json, print_table, show
from .model import Device

if TYPE_CHECKING:
    from .demo import Demo


def register_demo(app: typer.Typer) -> None:
    """Adds the first command of the help."""
    command(app)(demo)


def register(app: typer.Typer) -> None:
    """Adds the others."""
    for function in (doctor, verify, convert):
        command(app)(function)


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the picture.")] = Path(
        "internvl_demo.png"
    ),
    light: Annotated[bool, typer.Option("--light", help="A light page.")] = False,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="[default: float32]")] = None,
    as_json: Json = False,
) -> None:
    """Run the embedded models on held-out pictures: no network, a few seconds.

    Classifies, describes, questions and searches 360 handwritten digits that they never saw, talks
    about several of them in one picture, and draws what came of it.
    """
    check_writable(out, "--out")
    from .demo import CHAT, run
    from .sheet import draw

    if not as_json:
        notice("the embedded models on 360 held-out pictures ...")
    seen = run(device, dtype)
    draw(seen, light).save(out)
    if as_json:
        print_json(seen.document() | {"picture": str(out)})
        return
    print_table(("task", "right", "seconds"), _results(seen))
    typer.echo()
    examples = seen.pictures[:84:21]
    rows = [(p.caption, p.label["c"], _percent(p.probability["c"]), p.truth) for p in examples]
    print_table(("it says", "digit", "sure", "it is"), rows)
    typer.echo()
    talks = [(scene.answers[0], scene.answers[1], scene.truths[0]) for scene in seen.scenes[:6]]
    print_table((*CHAT, "it is"), talks)
    show(f"\n{len(seen.pictures)} pictures in {seen.seconds['all']:.1f} s; see {out}")


def _results(seen: "Demo") -> list[tuple[str, str, float]]:
    right, more, seconds = seen.accuracy, seen.more, seen.seconds
    return [
        ("zero-shot digits, C", _percent(right["zero_shot_c"]), seconds["classify_c"]),
        ("zero-shot digits, G", _percent(right["zero_shot_g"]), seconds["classify_g"]),
        ("captions, to the letter", _percent(right["caption"]), seconds["caption"]),
        ("answers: what colour?", _percent(more["answer_colour"]), seconds["answer"] / 2),
        ("answers: what digit?", _percent(more["answer_digit"]), seconds["answer"] / 2),
        ("search by text, R@1", _percent(right["retrieval_r1"]), seconds["index_and_search"]),
        ("chat: what is this?", _percent(right["chat"]), seconds["chat"] / 2),
        ("chat, then: what colour?", _percent(more["chat_later"]), seconds["chat"] / 2),
    ]


def doctor(
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Wait for packages that take seconds to import.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what this machine will run, why, and what to do about problems."""
    from .doctor import PATIENCE, examine
    from .doctor_page import show_page

    found = examine(None if thorough else PATIENCE)
    if as_json:
        print_json(found)
    else:
        show_page(found)


def verify(
    directory: Annotated[Path, typer.Argument(help="A downloaded checkpoint.")],
    images: Annotated[
        list[Path] | None,
        typer.Option("--image", help="One of the model card's three example images, in order."),
    ] = None,
    hashes: Annotated[bool, typer.Option(help="Read every byte for its SHA-256.")] = True,
    as_json: Json = False,
) -> None:
    """Check a checkpoint: names, shapes, finite values, hashes, and the published example."""
    from ..verification import verify as check

    report = check(directory, images or None, hashes=hashes)
    failure = f"{directory}: the checkpoint is damaged, or not one that is known here"
    if as_json:
        print_json(report.as_dict() | ({} if report.ok else {"error": failure}))
    else:
        show(report)
    if not report.ok:
        notice(failure)
        raise typer.Exit(1)


def convert(
    source: Annotated[str, typer.Argument(help="Directory, weight file or hub id.")],
    target: Annotated[Path, typer.Argument(help="Directory to write.")],
    dtype: Annotated[str | None, typer.Option(help="[default: as stored]")] = None,
    quantize: Annotated[
        str | None,
        typer.Option(help="int8, int4 or fp8: large weights in that form, to be mapped as it is."),
    ] = None,
    parts: Annotated[
        str | None,
        typer.Option(
            help="all, c, g, image, text or caption; of a chat model all, vision or language. "
            "[default: what is there]"
        ),
    ] = None,
    merge_lora: Annotated[bool, typer.Option("--merge-lora", help="Fold LoRA in.")] = False,
    layout: Annotated[
        str | None,
        typer.Option(help="Of a chat model: published or transformers. [default: as it is]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint again: another dtype or layout, fewer parts, LoRA merged, quantized."""
    from ..conversion import convert as rewrite

    files = rewrite(
        source, target, dtype=dtype, quantize=quantize, parts=parts, merge_lora=merge_lora,
        layout=layout,
    )  # fmt: skip
    if as_json:
        sizes = {path.name: path.stat().st_size for path in files}
        print_json({"source": source, "target": str(target), "files": sizes})
        return
    rows = [(path, f"{path.stat().st_size:,}") for path in files]
    print_table(("file", "bytes"), rows)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
