"""Commands on this machine and on checkpoints: demo, doctor, verify, convert, bench."""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from .console import Json, check_writable, command, notice, print_json, print_table, show
from .model import Device

if TYPE_CHECKING:
    from ..benchmarks.report import Suites
    from .demo import Demo

bench = typer.Typer(help="Time this machine.", no_args_is_help=True)


def register_demo(app: typer.Typer) -> None:
    """Adds the first command of the help."""
    command(app)(demo)


def register(app: typer.Typer) -> None:
    """Adds the others."""
    for function in (doctor, verify, convert):
        command(app)(function)
    for benchmark in (kernels, layers, encoder, chat):
        command(bench)(benchmark)
    app.add_typer(bench, name="bench")


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


class BenchOptions(NamedTuple):
    """How long to measure, and where the results go."""

    rounds: Annotated[int, typer.Option("--rounds", min=2, help="Samples of each, at least.")] = 10
    quick: Annotated[bool, typer.Option("--quick", help="Few samples: does everything run?")] = (
        False
    )
    cpu_time: Annotated[
        bool,
        typer.Option("--cpu-time", help="Processor time of one thread: for a busy machine."),
    ] = False
    json: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the rows to this file; - prints them."),
    ] = None
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="DIR", help="Draw pictures here.")
    ] = None
    compare: Annotated[
        Path | None,
        typer.Option("--compare", metavar="FILE", help="Say what got slower than in this result."),
    ] = None

    def run(self, suites: "Suites") -> None:
        """Measures, prints and stores; exit code 1 where a benchmark failed."""
        from ..benchmarks.report import measure
        from ..benchmarks.timing import Effort

        effort = (
            Effort(30.0, 3, self.cpu_time)
            if self.quick
            else Effort(300.0, self.rounds, self.cpu_time)
        )
        printed = self.json == Path("-")
        if self.json is not None and not printed:
            check_writable(self.json, "--json")
        with contextlib.redirect_stdout(sys.stderr if printed else sys.stdout):
            report = measure(
                suites, effort=effort, json_file=None if printed else self.json, plot=self.plot,
                compare=self.compare,
            )  # fmt: skip
        if printed:
            print_json(report.document())
        if report.failed:
            notice(f"{len(report.failed)} of the benchmarks failed")
            raise typer.Exit(1)


USUAL = BenchOptions()


def kernels(
    operators: Annotated[list[str] | None, typer.Argument(help="Which; all by default.")] = None,
    options: BenchOptions = USUAL,
) -> None:
    """Every operator against its rivals on this machine."""
    from ..benchmarks.kernels import suites

    options.run(suites(operators or ()))


def layers(
    which: Annotated[
        list[str] | None, typer.Argument(help="vision, vision_300m, qllama, decoder; all.")
    ] = None,
    images: Annotated[int, typer.Option("--images", min=1, help="In a batch.")] = 4,
    options: BenchOptions = USUAL,
) -> None:
    """One layer of each tower at real width, against transformers', compiled and bare products."""
    from ..benchmarks.layers import suites

    options.run(suites(which or (), images))


def encoder(
    images: Annotated[
        list[int] | None,
        typer.Option("--images", min=1, help="Batch sizes; 1 and 64, on a CPU 1 and 4."),
    ] = None,
    depth: Annotated[
        int | None, typer.Option("--layers", min=1, help="Depth; 48, on a CPU 2.")
    ] = None,
    compiles: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Time torch.compile, too.")
    ] = True,
    options: BenchOptions = USUAL,
) -> None:
    """InternViT-6B with random weights, from images to features, against its rivals."""
    from ..benchmarks.encoder import cases

    options.run({"encoder": lambda device: cases(device, images or (), depth, compiles=compiles)})


def chat(
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or bfloat16.")] = "bfloat16",
    tiles: Annotated[int, typer.Option("--tiles", min=1, help="Of an image.")] = 5,
    options: BenchOptions = USUAL,
) -> None:
    """A chat model of InternVL3-1B's shape with random weights, against transformers' own."""
    import torch

    from ..benchmarks.chat import cases

    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"bench: --dtype must be float32 or bfloat16, got {dtype!r}")
    options.run({"chat": lambda device: cases(device, getattr(torch, dtype), tiles=tiles)})


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
