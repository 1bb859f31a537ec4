"""`internvl chat`: one question about pictures, or a conversation on a terminal or from a pipe."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import Json, command, print_json, show
from .conversation import Conversation, talk
from .images import Beams
from .model import ChatModelOptions
from .pictures import STANDARD_INPUT, sources

NO_MODEL = ChatModelOptions()
ENDINGS = {  # what is no question, even where there is no such file
    ".apng", ".avif", ".bmp", ".gif", ".heic", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif",
    ".tiff", ".webp",
}  # fmt: skip


def register(app: typer.Typer) -> None:
    """Adds the command."""
    command(app)(chat)


def chat(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IMAGE...] [QUESTION]",
            help="Image files (- is standard input), and a question about them. Without a question "
            "a conversation begins.",
        ),
    ] = None,
    question: Annotated[
        str | None, typer.Option("--question", "-q", help="The question, if it looks like a file.")
    ] = None,
    video: Annotated[
        list[Path] | None,
        typer.Option(help="A video, or a folder of its frames; may be repeated."),
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames to take of a video.")] = None,
    system: Annotated[
        str | None, typer.Option(help="Sentence of the system, in place of the checkpoint's.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Of every answer.")
    ] = 1024,
    max_tiles: Annotated[
        int | None,
        typer.Option("--max-tiles", min=1, help="Tiles of every image. [default: the model's]"),
    ] = None,
    beams: Beams = 1,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the most likely word, more is freer.")
    ] = 0.0,
    model: ChatModelOptions = NO_MODEL,
    as_json: Json = False,
) -> None:
    """Talk about images: ask a question, or hold a conversation.

    internvl chat photo.jpg "What is this?"
    """
    names, asked = _split(words or [], question)
    if asked is None and any(name in STANDARD_INPUT for name in names):
        raise typer.BadParameter(
            "standard input is a picture; give the question, too", param_hint="QUESTION"
        )
    pictures = sources(names)
    options: dict[str, Any] = {
        "system_message": system, "max_new_tokens": max_new_tokens, "max_tiles": max_tiles,
        "num_beams": beams, "num_frames": frames,
    }  # fmt: skip
    if temperature > 0:
        options |= {"do_sample": True, "temperature": temperature}
    _check(pictures, video or [])
    engine = model.load()
    conversation = Conversation(engine, options, pictures, names, [str(v) for v in video or []])
    if asked is None:
        talk(conversation, as_json)
        return
    given = conversation.given()
    if as_json:
        print_json({"model": engine.name, **given, "question": asked,
                    "answer": conversation.ask(asked)})  # fmt: skip
        return
    conversation.ask(asked, lambda piece: show(piece, end=""))
    show("")


def _split(words: list[str], question: str | None) -> tuple[list[str], str | None]:
    """The images and the question among the words of a command line."""
    if question is None and words and not _is_image(words[-1]):
        *words, question = words
    if question is not None and not question.strip():
        raise typer.BadParameter("the question is empty", param_hint="QUESTION")
    return words, question


def _check(pictures: list[Any], videos: list[Path]) -> None:
    """Raises what is wrong with a picture before a model is loaded, which takes long."""
    from ..processing import load_image, video_frames

    for picture in pictures:
        load_image(picture)
    for video in videos:
        video_frames(video, 1)


def _is_image(word: str) -> bool:
    """Whether a word is to be opened: a file, or what looks like the name of one."""
    ending = os.path.splitext(word)[1].lower()
    looks_so = ending in ENDINGS and not any(c.isspace() for c in os.path.basename(word).strip())
    return word in STANDARD_INPUT or looks_so or os.path.exists(word)
