"""`internvl bench`: operators, layers and models against their rivals on this machine."""

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from .console import check_writable, command, notice, print_json, print_table, show

if TYPE_CHECKING:
    from ..benchmarks.report import Suites

bench = typer.Typer(help="Time this machine.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Adds its commands."""
    for benchmark in (kernels, layers, encoder, chat, model, fidelity):
        command(bench)(benchmark)
    app.add_typer(bench, name="bench")


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


def model(
    which: Annotated[
        list[str] | None,
        typer.Argument(help="encode, lengths, text, decode, layers, fidelity, load; all."),
    ] = None,
    size: Annotated[
        str,
        typer.Option(
            "--size", help="nano; layer, at real width; 14b, the whole model, in --folder."
        ),
    ] = "layer",
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or bfloat16.")] = "bfloat16",
    quantize: Annotated[
        list[str] | None,
        typer.Option(
            "--quantize", help="int8, int4 or fp8; again for several. [default: int8, int4]"
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder", help="Of 14b: its checkpoint, random weights where there is none."
        ),
    ] = None,
    compiles: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Time torch.compile, too.")
    ] = True,
    options: BenchOptions = USUAL,
) -> None:
    """InternVL-14B with wide and with quantized weights: images, texts, captions, and rivals."""
    import torch

    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"bench: --dtype must be float32 or bfloat16, got {dtype!r}")
    if size == "14b":
        _whole(which, quantize, folder, dtype, options)
        return
    from ..benchmarks.model import suites

    schemes = tuple(quantize or ("int8", "int4"))
    options.run(suites(which or (), size, getattr(torch, dtype), schemes, compiles))


def _whole(
    which: list[str] | None, quantize: list[str] | None, folder: Path | None, dtype: str,
    options: BenchOptions,
) -> None:  # fmt: skip
    """The full-size model: seconds and memory in place of a table."""
    from ..benchmarks.full_size import page, run

    if which or folder is None or len(quantize or ()) > 1:
        raise ValueError(
            "bench: --size 14b takes --folder, for a checkpoint of 10 to 28 GB, at most one "
            "--quantize, and nothing else"
        )
    if options.json is not None and options.json != Path("-"):
        check_writable(options.json, "--json")
    found = run(folder, quantize[0] if quantize else None, dtype)
    if options.json == Path("-"):
        print_json(found)
        return
    show(page(found))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def fidelity(
    which: Annotated[
        list[str] | None,
        typer.Argument(help="nano, nano-chat, 'real width'; all by default."),
    ] = None,
    quantize: Annotated[
        list[str] | None,
        typer.Option("--quantize", help="int8, int4 or fp8; again for several; all by default."),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="That quantized ones compute in.")] = (
        "float32"
    ),
    count: Annotated[
        int | None, typer.Option("--count", min=1, help="Held-out pictures; all of them.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """What quantized weights lose: right answers of the embedded models, cosines at real width."""
    import torch

    from ..schemes import SCHEMES
    from ..verification.fidelity import MODELS
    from ..verification.fidelity import fidelity as measured

    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"bench: --dtype must be float32 or bfloat16, got {dtype!r}")
    found = measured(
        quantize or tuple(SCHEMES), which or MODELS, dtype=getattr(torch, dtype), count=count
    )
    rows = [vars(row) for row in found]
    if as_json:
        print_json(rows)
        return
    print_table(
        ("model", "measure", "scheme", "wide", "quantized", "as wide", "bytes of bf16"),
        [[f"{v:.5f}" if isinstance(v, float) else v for v in row.values()] for row in rows],
    )
