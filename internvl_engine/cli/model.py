"""Which model a command runs on, and where: options that most commands have."""

from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..printable import printable
from .console import notice

if TYPE_CHECKING:
    from ..engine import InternVL, InternVLChat

NANO, NANO_CHAT = "nano", "nano-chat"
VARIABLE, CHAT_VARIABLE = "INTERNVL_MODEL", "INTERNVL_CHAT_MODEL"

Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the GPU where there is one.")]
Mode = Annotated[str, typer.Option(help="c: vision tower alone; g: with QLLaMA's queries.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]


Quantize = Annotated[
    str | None,
    typer.Option(help="int8, int4 or fp8: hold large weights so; a checkpoint may already."),
]


class ModelOptions(NamedTuple):
    """Which model, and where."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            envvar=VARIABLE,
            show_default=False,
            help="Directory or hub id of a checkpoint; without one, nano, the embedded model.",
        ),
    ] = None
    device: Device = None
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto"
    quantize: Quantize = None

    def load(self, parts: str) -> "InternVL":
        """The engine of a command, with only the parts that it needs."""
        from ..engine import InternVL

        options: dict[str, Any] = {
            "device": self.device, "parts": parts, "quantize": self.quantize
        }  # fmt: skip
        if self.model is None:
            notice(
                f"no --model and no {VARIABLE}: using the embedded nano model, which knows nothing "
                "but handwritten digits in coloured ink"
            )
        if self.model is None or self.model == NANO:  # a folder of that name is ./nano
            dtype = {} if self.dtype == "auto" else {"dtype": self.dtype}
            return InternVL.nano(**options, **dtype)
        return InternVL.from_pretrained(self.model, dtype=self.dtype, **options)


class ChatModelOptions(NamedTuple):
    """Which chat model, and where."""

    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            envvar=CHAT_VARIABLE,
            show_default=False,
            help="Directory or hub id of a chat checkpoint; without one, nano-chat, the embedded "
            "model.",
        ),
    ] = None
    device: Device = None
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto"
    quantize: Quantize = None

    def load(self) -> "InternVLChat":
        """The engine of a command."""
        from ..engine import InternVLChat

        if self.model is None:
            notice(
                f"no --model and no {CHAT_VARIABLE}: using the embedded nano-chat model, which "
                "knows nothing but handwritten digits in coloured ink"
            )
        if self.model is None or self.model == NANO_CHAT:  # a folder of that name is ./nano-chat
            dtype = {} if self.dtype == "auto" else {"dtype": self.dtype}
            return InternVLChat.nano(device=self.device, quantize=self.quantize, **dtype)
        return InternVLChat.from_pretrained(
            self.model, dtype=self.dtype, device=self.device, quantize=self.quantize
        )


def check_mode(mode: str, *others: str) -> str:
    """A mode that exists; wrong usage otherwise."""
    known = ("c", "g", *others)
    if mode not in known:
        message = f"'{printable(mode)}' is not one of {', '.join(known)}"
        raise typer.BadParameter(message, param_hint="--mode")
    return mode


def parts_for(mode: str, *, images: bool = True, texts: bool = False) -> str:
    """The least parts of the model that embed images, in a mode that exists, or texts, or both."""
    if not images:
        return "text"
    if mode != "c":
        return "g"
    return "c" if texts else "image"
