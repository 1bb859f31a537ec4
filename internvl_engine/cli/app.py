"""`internvl`: the list of commands, in the order of its help."""

from typing import Annotated

import typer

from .. import __version__
from . import bench, chat, images, machine, search

app = typer.Typer(
    help="InternVL-14B on fused kernels: classify, describe, question and find images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and exit.")
    ] = False,
) -> None:
    pass


machine.register_demo(app)
images.register(app)
chat.register(app)
search.register(app)
machine.register(app)
bench.register(app)
