"""Which model a command runs on, and where."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import notice

if TYPE_CHECKING:
    from ..engine import InternVL

NANO = "nano"
VARIABLE = "INTERNVL_MODEL"

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        envvar=VARIABLE,
        show_default=False,
        help="Directory or hub id of a checkpoint; without one, nano, the embedded model.",
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the GPU where there is one.")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")]
Mode = Annotated[str, typer.Option(help="c: vision tower alone; g: with QLLaMA's queries.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]


def load(model: str | None, device: str | None, dtype: str, parts: str) -> "InternVL":
    """The engine of a command, with only the parts that it needs."""
    from ..engine import InternVL

    options: dict[str, Any] = {"device": device, "parts": parts}
    if model is None:
        notice(
            f"no --model and no {VARIABLE}: using the embedded nano model, which knows nothing but "
            "handwritten digits in coloured ink"
        )
    if model is None or model == NANO:  # a folder of that name is ./nano
        return InternVL.nano(**options, **({} if dtype == "auto" else {"dtype": dtype}))
    return InternVL.from_pretrained(model, dtype=dtype, **options)


def check_mode(mode: str, *others: str) -> str:
    """A mode that exists; wrong usage otherwise."""
    known = ("c", "g", *others)
    if mode not in known:
        raise typer.BadParameter(f"{mode!r} is not one of {', '.join(known)}", param_hint="--mode")
    return mode
